"""Recovery after a cut: the factors, or LoRA on them, are trained towards the dense model.

Loss: a mix of the language-model loss and the KL divergence from the dense model, on the
calibration text (docs/methods.md, section 7); of a model whose embeddings are to be kept, half the
squared distance to the dense model's. Layers of feed-forwards that lost channels are
trained as the factors are; everything else is frozen. LoRA is merged afterwards, so both kinds end
with the same layers. The result is kept only if the loss on held-out text falls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_lowrank.errors import ConfigError, DataError, NumericalError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.rebuild import compressed_layers
from hf_lowrank.measuring.causal import check_distillable, distillation_losses, hidden_states
from hf_lowrank.measuring.embeddings import EmbeddingLoss
from hf_lowrank.measuring.items import Batch, eval_mode, is_causal_lm
from hf_lowrank.measuring.progress import track
from hf_lowrank.modeling.lora import check_peft, lora_on_factors
from hf_lowrank.modeling.surgery import swapped
from hf_lowrank.report.sections import Recovery
from hf_lowrank.value_checks import check_choice

# What is trained, and at which peak rate of AdamW.
RECOVERIES = {"factors": 1e-4, "lora": 1e-3}


@dataclass(frozen=True)
class RecoverySettings:
    """How to recover.

    Attributes:
        steps: Optimizer steps, one batch each.
        learning_rate: Peak rate of AdamW; warm-up over a tenth of the steps, then cosine to 0.
            None: 1e-4 for the factors, 1e-3 for LoRA.
        kl_weight: Weight of the KL divergence from the dense model; the rest is on the text's
            own labels.
        max_grad_norm: Gradients are clipped to this norm.
        seed: Seed of the order of the batches, and of LoRA's start.
        kind: "factors" trains the factors, "lora" adapters on them.
        lora_rank: Rank of the adapters.

    Raises:
        ConfigError: The kind is unknown, or it is "lora" and peft is missing.
    """

    steps: int
    learning_rate: float | None = None
    kl_weight: float = 0.5
    max_grad_norm: float = 1.0
    seed: int = 0
    kind: str = "factors"
    lora_rank: int = 8

    def __post_init__(self) -> None:
        """Checks the kind."""
        check_choice("recover", self.kind, (*RECOVERIES,))
        if self.kind == "lora":
            check_peft()

    @property
    def peak_rate(self) -> float:
        """The learning rate in force."""
        return RECOVERIES[self.kind] if self.learning_rate is None else self.learning_rate


def recovery_settings(kind: str | None, steps: int, seed: int = 0) -> RecoverySettings | None:
    """The settings of a run's recovery, None without steps.

    Raises:
        ConfigError: A kind was asked for, but no steps, or the kind is unknown.
    """
    settings = RecoverySettings(steps, seed=seed, kind=kind or "factors")
    if steps > 0:
        return settings
    if kind is not None:
        raise ConfigError(f"recover={kind!r} does nothing without steps; give recover_steps > 0.")
    return None


def check_recoverable(
    model: nn.Module,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    embedding: EmbeddingLoss | None = None,
) -> None:
    """Refuses what `recover_` can't work with, before a cut.

    Args:
        model: The dense model.
        batches: Calibration text.
        held_out: Text on which the result is judged.
        embedding: The loss, where embeddings are to be kept.

    Raises:
        ConfigError: Its loss is another and the model is no causal language model, or its logits
            are not made of its last hidden states by the head, position by position.
        DataError: There is no calibration text or no held-out text.
    """
    if embedding is None and not is_causal_lm(model):
        raise ConfigError(
            f"recover_steps compare next-token distributions; {type(model).__name__} is no "
            "causal language model. Fine-tune it with Trainer instead."
        )
    if not (batches and held_out):
        raise DataError(
            "A recovery needs calibration text to train on and held-out text to be judged by; "
            f"got {len(batches)} and {len(held_out)} batches."
        )
    if embedding is None:
        check_distillable(model, batches[0])


def recover_(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: RecoverySettings,
    progress: bool = True,
    embedding: EmbeddingLoss | None = None,
    trained: Sequence[nn.Parameter] | None = None,
) -> Recovery:
    """Trains the factors, or LoRA on them, in place.

    The dense layers are put back for the teacher's forward pass of each batch, so there is one
    model in memory. Its last hidden states, or its embeddings, are kept on the CPU for batches
    that come again.

    Args:
        model: The compressed causal language model, or one whose embeddings are to be kept.
        originals: Its dense layers, from `factorize_`.
        batches: Calibration text.
        held_out: Text on which the result is judged.
        settings: How to train.
        progress: Whether to show progress.
        embedding: The loss, where embeddings are to be kept; the held-out batches then have the
            dense model's as labels.
        trained: What to train in place of the compressed layers' weights.

    Raises:
        ConfigError, DataError: See `check_recoverable`.
        NumericalError: The loss is NaN or infinite; the factors are then as before.
    """
    check_recoverable(model, batches, held_out, embedding)
    layers = compressed_layers(model).values()
    factors = trained or [p for layer in layers for p in _weights(layer)]
    start = [parameter.detach().clone() for parameter in factors]
    before = measure_loss(model, held_out, loss_function=embedding).mean
    if not factors:  # all layers stayed dense
        return Recovery(before, before, False, 0, settings.kind)
    try:
        with eval_mode(model):
            if settings.kind == "lora":
                with lora_on_factors(model, settings.lora_rank, settings.seed) as adapters:
                    _train_(model, originals, batches, adapters, settings, progress, embedding)
            else:
                _train_(model, originals, batches, factors, settings, progress, embedding)
        after = measure_loss(model, held_out, loss_function=embedding).mean
    except BaseException:
        _restore_(factors, start)
        raise
    if after >= before:
        _restore_(factors, start)
    return Recovery(before, after, after < before, settings.steps, settings.kind)


def _train_(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    trained: Sequence[nn.Parameter],
    settings: RecoverySettings,
    progress: bool,
    embedding: EmbeddingLoss | None,
) -> None:
    """AdamW on fp32 copies of what is trained: a step of 1e-4 is lost in bf16's rounding."""
    masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in trained]
    optimizer = torch.optim.AdamW(masters, lr=settings.peak_rate, weight_decay=0.0)
    warmup = max(1, settings.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, warmup, settings.steps)
    )
    frozen = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    order = _order(len(batches), settings)
    left, kept = Counter(order), dict[int, torch.Tensor]()  # teacher's states, by batch
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        for step in track(order, "recover" if progress else None, "steps"):
            batch = {name: tensor.to(device) for name, tensor in batches[step].items()}
            left[step] -= 1
            teacher = kept.pop(step, None)
            if teacher is None:
                with torch.no_grad(), swapped(model, originals):
                    teacher = (embedding.embed if embedding else hidden_states)(model, batch)
            if left[step]:
                kept[step] = teacher.cpu()
            teacher = teacher.to(device)
            if embedding:
                found = embedding(model, {**batch, "labels": teacher})
            else:
                found = distillation_losses(model, batch, teacher, settings.kl_weight)
            loss = found.sums.sum() / found.counts.sum()
            if not bool(torch.isfinite(loss.detach())):
                raise NumericalError(
                    f"The recovery loss is {float(loss.detach())}; load the model in float32, or "
                    "leave the recovery out."
                )
            loss.backward()
            _step(masters, trained, optimizer, settings.max_grad_norm)
            scheduler.step()
    finally:
        for parameter in trained:
            parameter.grad = None
            parameter.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)


def _step(
    masters: Sequence[nn.Parameter],
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
) -> None:
    for master, parameter in zip(masters, trained, strict=True):
        master.grad = None if parameter.grad is None else parameter.grad.float()
        parameter.grad = None
    torch.nn.utils.clip_grad_norm_(masters, max_grad_norm)
    optimizer.step()
    _restore_(trained, masters)


@torch.no_grad()
def _restore_(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if not name.endswith("bias")]


def _order(size: int, settings: RecoverySettings) -> list[int]:
    """Indices of the batches in the order of training: a new shuffle for each pass."""
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    while len(order) < settings.steps:
        order += torch.randperm(size, generator=generator).tolist()
    return order[: settings.steps]


def _rate(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

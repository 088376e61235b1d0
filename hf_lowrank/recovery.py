"""Recovery after a cut: the factors alone are trained towards the dense model.

Loss: a mix of the language-model loss and the KL divergence from the dense model, on the
calibration text (docs/methods.md, section 7). Everything but the factors is frozen. The result
is kept only if the loss on held-out text falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.losses import Batch, distillation_losses, eval_mode, hidden_states
from hf_lowrank.modeling_lowrank import LowRankLinear
from hf_lowrank.surgery import factorized_layers, swapped


@dataclass(frozen=True)
class RecoverySettings:
    """How to recover.

    Attributes:
        steps: Optimizer steps, one batch each.
        learning_rate: Peak rate of AdamW; warm-up over a tenth of the steps, then cosine to 0.
        kl_weight: Weight of the KL divergence from the dense model; the rest is on the text's
            own labels.
        max_grad_norm: Gradients are clipped to this norm.
        seed: Seed of the order of the batches.
    """

    steps: int
    learning_rate: float = 1e-4
    kl_weight: float = 0.5
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class RecoveryResult:
    """What recovery did.

    Attributes:
        loss_before: Held-out loss after the cut, nats per token.
        loss_after: Held-out loss after the last step.
        accepted: Whether the trained factors were kept.
        steps: Steps taken.
    """

    loss_before: float
    loss_after: float
    accepted: bool
    steps: int


def recover_(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: RecoverySettings,
    progress: bool = True,
) -> RecoveryResult:
    """Trains the factors in place.

    The dense layers are put back for the teacher's forward pass of each batch, so there is one
    model in memory.

    Args:
        model: The compressed causal language model.
        originals: Its dense layers, from `factorize_`.
        batches: Calibration text.
        held_out: Text on which the result is judged.
        settings: How to train.
        progress: Whether to show a progress bar.

    Raises:
        NumericalError: The loss is NaN or infinite; the factors are then as before.
    """
    if not batches:
        raise DataError("Recovery needs calibration text.")
    factors = [p for layer in factorized_layers(model).values() for p in _weights(layer)]
    start = [parameter.detach().clone() for parameter in factors]
    before = measure_loss(model, held_out).mean
    try:
        with eval_mode(model):
            _train(model, originals, batches, factors, settings, progress)
        after = measure_loss(model, held_out).mean
    except BaseException:
        _restore(factors, start)
        raise
    if after >= before:
        _restore(factors, start)
    return RecoveryResult(before, after, after < before, settings.steps)


def _train(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    factors: Sequence[nn.Parameter],
    settings: RecoverySettings,
    progress: bool,
) -> None:
    """AdamW on fp32 copies of the factors: a step of 1e-4 is lost in bf16's rounding."""
    masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in factors]
    optimizer = torch.optim.AdamW(masters, lr=settings.learning_rate, weight_decay=0.0)
    warmup = max(1, settings.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, warmup, settings.steps)
    )
    frozen = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    order = _order(len(batches), settings)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter in factors:
            parameter.requires_grad_(True)
        for step in tqdm(order, desc="recover", disable=None if progress else True, leave=False):
            batch = {name: tensor.to(device) for name, tensor in batches[step].items()}
            with torch.no_grad(), swapped(model, originals):
                teacher = hidden_states(model, batch)
            found = distillation_losses(model, batch, teacher, settings.kl_weight)
            loss = found.sums.sum() / found.counts.sum()
            if not bool(torch.isfinite(loss.detach())):
                raise NumericalError(
                    f"The recovery loss is {float(loss.detach())}; lower the learning rate."
                )
            loss.backward()
            _step(masters, factors, optimizer, settings.max_grad_norm)
            scheduler.step()
    finally:
        for parameter in factors:
            parameter.grad = None
            parameter.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)


def _step(
    masters: Sequence[nn.Parameter],
    factors: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
) -> None:
    for master, factor in zip(masters, factors, strict=True):
        master.grad = None if factor.grad is None else factor.grad.float()
        factor.grad = None
    torch.nn.utils.clip_grad_norm_(masters, max_grad_norm)
    optimizer.step()
    _restore(factors, masters)


@torch.no_grad()
def _restore(factors: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for factor, value in zip(factors, values, strict=True):
        factor.copy_(value)


def _weights(layer: LowRankLinear) -> list[nn.Parameter]:
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

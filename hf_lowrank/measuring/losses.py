"""The loss of a batch, item by item, without ever holding all logits of a large vocabulary.

For causal language models the final projection and the cross-entropy are computed over slices of
positions. Everything else goes through the model's own forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
)

from hf_lowrank.errors import ConfigError, DataError

Batch = Mapping[str, torch.Tensor]
IGNORED = -100
SLICE_TOKENS = 512
_CAUSAL_MODELS = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_SPAN_MODELS = frozenset(MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values())


@dataclass(frozen=True)
class ItemLosses:
    """Losses of one batch.

    Attributes:
        sums: Loss summed over the scored positions of each item, nats, fp32, shape (batch,).
        counts: Scored positions of each item, shape (batch,); 1 for sentence-level tasks.
    """

    sums: torch.Tensor
    counts: torch.Tensor


LossFunction = Callable[[nn.Module, Batch], ItemLosses]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of the block; afterwards every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def item_losses(model: nn.Module, batch: Batch, label_source: str = "data") -> ItemLosses:
    """Losses of a batch on a transformers model; differentiable unless grad is disabled.

    Args:
        model: A `PreTrainedModel` with a head.
        batch: Inputs of the forward pass, on the model's device. Causal language models take their
            labels from `labels`, or from `input_ids` where `attention_mask` is 1; the others need
            `labels` (or `start_positions` and `end_positions`) unless they are sampled.
        label_source: "data", or "model" to sample the labels from the model's own predictions,
            which makes squared gradients an unbiased estimate of the Fisher information.

    Raises:
        ConfigError: The model has no output that a loss can be computed from, or it writes text
            and is neither an encoder-decoder nor a causal language model that transformers lists.
        DataError: The batch lacks labels.
    """
    if is_causal_lm(model):
        return _causal_losses(model, batch, sample=label_source == "model")
    return _head_losses(model, batch, sample=label_source == "model")


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model is a causal language model, judged by its class and those above it."""
    return _is_one_of(model, _CAUSAL_MODELS)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(getattr(_config(model), "is_encoder_decoder", False))


def prepare_losses(model: nn.Module, batch: Batch) -> None:
    """Runs what `item_losses` has to find out once about a model, for callers that use hooks."""
    if is_causal_lm(model):
        _head_is_last(model, batch)


def forward_body(model: nn.Module, batch: Batch) -> None:
    """Runs the layers on a batch for the sake of hooks, without head and loss where possible."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if is_causal_lm(model) and _head_is_last(model, batch):
        _hidden_states(model, batch)
    else:
        model(**(batch if is_encoder_decoder(model) else inputs))


def _causal_losses(model: nn.Module, batch: Batch, sample: bool) -> ItemLosses:
    targets = _next_tokens(batch)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if _head_is_last(model, batch):
        hidden = _hidden_states(model, batch)
        flat = hidden.reshape(-1, hidden.shape[-1])
        losses = _SlicedLoss.apply(  # type: ignore[no-untyped-call]
            flat, head, targets.flatten(), partial(_cross_entropy, sample=sample), None
        )
    else:
        # The model changes its logits after the head (a soft cap, a scale): use them as they are.
        logits = model(**_without_labels(batch), use_cache=False).logits
        losses = _cross_entropy(logits.flatten(0, 1), targets.flatten(), sample)
    per_position = cast(torch.Tensor, losses).view(targets.shape)
    return ItemLosses(per_position.sum(dim=1), (targets != IGNORED).sum(dim=1))


def _next_tokens(batch: Batch) -> torch.Tensor:
    """Target of each position, shape (batch, length): the next label, IGNORED at the end."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    if "labels" not in batch and "attention_mask" in batch:
        # With padding on the left, the first token has nothing before it to be predicted from.
        targets = targets.masked_fill(batch["attention_mask"] == 0, IGNORED)
    return targets


def _hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    body = _inner(model).base_model
    hidden: torch.Tensor = body(**_without_labels(batch), use_cache=False)[0]  # type: ignore[operator]
    return hidden


def _without_labels(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


_HEAD_IS_LAST: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _head_is_last(model: nn.Module, batch: Batch) -> bool:
    """Whether the logits are exactly head(hidden states); found out once for each model."""
    known = _HEAD_IS_LAST.get(model)
    if known is None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        inner = _inner(model)
        if head is None or getattr(inner, "base_model", inner) is inner:
            known = False
        else:
            device = next(model.parameters()).device
            probe = {"input_ids": batch["input_ids"][:1, :4].to(device)}
            # Accelerate's mixed precision rounds the logits, compiled kernels do so differently.
            forward = getattr(model, "_original_forward", getattr(model, "_orig_mod", model))
            with eval_mode(model):
                expected = forward(**probe, use_cache=False).logits.float()
                found = head(_hidden_states(model, probe)).float()
            known = torch.equal(expected, found)  # the same head on the same states
        _HEAD_IS_LAST[model] = known
    return known


class _SlicedLoss(torch.autograd.Function):
    """A loss of `head(hidden)` per position, over slices of positions.

    The gradient with respect to the hidden states is computed slice by slice along with the loss,
    so no more than SLICE_TOKENS rows of logits exist at a time. The head gets no gradient. With a
    teacher's hidden states the loss also sees `head(teacher)` of the slice.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        head: nn.Module,
        targets: torch.Tensor,
        loss: Callable[..., torch.Tensor],
        teacher: torch.Tensor | None,
    ) -> torch.Tensor:
        needs_grad = hidden.requires_grad
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.zeros_like(hidden) if needs_grad else None
        for start in range(0, len(hidden), SLICE_TOKENS):
            rows = slice(start, start + SLICE_TOKENS)
            if bool((targets[rows] == IGNORED).all()):
                continue
            part = hidden[rows].detach().requires_grad_(needs_grad)
            extra = () if teacher is None else (head(teacher[rows]),)
            with torch.set_grad_enabled(needs_grad):
                part_losses = loss(head(part), targets[rows], *extra)
                total = part_losses.sum()
            losses[rows] = part_losses.detach()
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(total, part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        weighted = gradient * grad_outputs[0][:, None].to(gradient.dtype)
        return weighted, None, None, None, None


def check_distillable(model: nn.Module, batch: Batch) -> None:
    """Refuses models without `hidden_states`; 4 tokens of the batch are read, once for each model.

    Raises:
        ConfigError: The model is no causal language model, or its logits are not simply its head
            applied to its last hidden states.
    """
    if not (is_causal_lm(model) and _head_is_last(model, batch)):
        raise ConfigError(
            f"{type(model).__name__}: distillation needs a causal language model whose logits are "
            "its head applied to the last hidden states; leave out recover_steps and "
            "measured_prices."
        )


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Last hidden states of a causal language model, shape (batch, length, hidden).

    Raises:
        ConfigError: See `check_distillable`.
    """
    check_distillable(model, batch)
    return _hidden_states(model, batch)


def distillation_losses(
    model: nn.Module, batch: Batch, teacher: torch.Tensor, kl_weight: float
) -> ItemLosses:
    """`(1 - w) CE(labels) + w KL(teacher || model)` per position; logits only slice by slice.

    Args:
        model: The student, a causal language model.
        batch: Its inputs.
        teacher: The teacher's last hidden states under the same head, from `hidden_states`.
        kl_weight: w, in [0, 1].
    """
    hidden, targets = hidden_states(model, batch), _next_tokens(batch)
    losses = _SlicedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]),
        model.get_output_embeddings(),  # type: ignore[operator]
        targets.flatten(),
        partial(_distillation, kl_weight=kl_weight),
        teacher.reshape(-1, teacher.shape[-1]),
    )
    per_position = cast(torch.Tensor, losses).view(targets.shape)
    return ItemLosses(per_position.sum(dim=1), (targets != IGNORED).sum(dim=1))


def _distillation(
    logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor, kl_weight: float
) -> torch.Tensor:
    student = logits.float().log_softmax(dim=-1)
    teacher = teacher_logits.float().log_softmax(dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)
    likelihood = F.nll_loss(student, targets, ignore_index=IGNORED, reduction="none")
    mixed = (1 - kl_weight) * likelihood + kl_weight * divergence
    return mixed.masked_fill(targets == IGNORED, 0.0)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, sample: bool) -> torch.Tensor:
    """Loss per row in fp32; ignored rows give 0. Sampled labels keep the ignored rows."""
    logits = logits.float()
    if sample:
        # Gumbel-max: one draw from softmax(logits) per row.
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-20, 1 - 1e-7)))
        drawn = (logits.detach() + noise).argmax(dim=-1)
        targets = torch.where(targets == IGNORED, targets, drawn)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def _head_losses(model: nn.Module, batch: Batch, sample: bool) -> ItemLosses:
    if _is_one_of(model, _SPAN_MODELS):
        return _span_losses(model, batch, sample)
    labels = batch.get("labels")
    needs_labels = is_encoder_decoder(model)
    if not needs_labels and getattr(model, "can_generate", lambda: False)():
        raise ConfigError(
            f"{type(model).__name__} writes text, but is not among the causal language models of "
            "transformers, so its loss is not known; pass a loss_function."
        )
    if labels is None and (not sample or needs_labels):
        advice = "add them" if needs_labels else "add them or set label_source='model'"
        raise DataError(
            f"The batches have no 'labels', which {type(model).__name__} needs; {advice}."
        )
    outputs = model(**(batch if needs_labels else _without_labels(batch)))
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ConfigError(
            f"{type(model).__name__} returns no logits, so it has no loss; load the model with "
            "its task head."
        )
    if labels is None:
        labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        if logits.ndim == 3 and "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    if logits.ndim == 3:
        losses = _cross_entropy(logits.flatten(0, 1), labels.flatten(), sample)
        return ItemLosses(losses.view(labels.shape).sum(1), (labels != IGNORED).sum(1))
    losses = _sentence_losses(model, logits, labels, sample)
    return ItemLosses(losses, torch.ones(len(losses), dtype=torch.long, device=losses.device))


def _sentence_losses(
    model: nn.Module, logits: torch.Tensor, labels: torch.Tensor, sample: bool
) -> torch.Tensor:
    logits = logits.float()
    problem = problem_type(model, logits, labels)
    if problem == "regression":
        if sample:
            # Variance k/2 of k averaged values: the expected squared gradient is the curvature.
            scale = (logits.shape[-1] / 2) ** 0.5
            labels = logits.detach() + torch.randn_like(logits) * scale
        squares = (logits - labels.float().view_as(logits)) ** 2
        return squares.mean(dim=-1)
    if problem == "multi_label_classification":
        labels = torch.bernoulli(logits.detach().sigmoid()) if sample else labels
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        return losses.mean(dim=-1)
    return _cross_entropy(logits, labels.view(-1).long(), sample)


def problem_type(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> str:
    """The sentence-level task, found out as transformers' own heads do."""
    known: str | None = getattr(_config(model), "problem_type", None)
    if known is not None:
        return known
    if logits.shape[-1] == 1:
        return "regression"
    is_integer = not labels.is_floating_point()
    return "single_label_classification" if is_integer else "multi_label_classification"


def _span_losses(model: nn.Module, batch: Batch, sample: bool) -> ItemLosses:
    """Extractive question answering; a position outside the text is ignored."""
    positions = ("start_positions", "end_positions")
    if not sample and not all(name in batch for name in positions):
        raise DataError(
            f"The batches have no {' and '.join(positions)}, which {type(model).__name__} needs; "
            "add them or set label_source='model'."
        )
    outputs = model(**{name: value for name, value in batch.items() if name not in positions})
    losses = []
    for name, logits in zip(positions, (outputs.start_logits, outputs.end_logits), strict=True):
        length = logits.shape[1]
        targets = batch[name].view(-1) if name in batch else logits.new_zeros(len(logits)).long()
        targets = targets.masked_fill((targets < 0) | (targets >= length), IGNORED)
        losses.append(_cross_entropy(logits, targets, sample))
    total = (losses[0] + losses[1]) / 2
    return ItemLosses(total, torch.ones(len(total), dtype=torch.long, device=total.device))


def _is_one_of(model: nn.Module, names: frozenset[str]) -> bool:
    return any(each.__name__ in names for each in type(_inner(model)).__mro__)


def _inner(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and PEFT."""
    if any(each.__name__ == "PeftModel" for each in type(model).__mro__):
        return _inner(model.get_base_model())  # type: ignore[operator]
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else _inner(compiled)


def _config(model: nn.Module) -> object:
    return getattr(model, "config", None)

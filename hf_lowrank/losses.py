"""The loss of a batch, item by item, without ever holding all logits of a large vocabulary.

For causal language models the final projection and the cross-entropy are computed over slices of
positions. Everything else goes through the model's own forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_lowrank.errors import ConfigError, DataError

Batch = Mapping[str, torch.Tensor]
IGNORED = -100
SLICE_TOKENS = 512


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
        ConfigError: The model has no output that a loss can be computed from.
        DataError: The batch lacks labels.
    """
    if is_causal_lm(model):
        return _causal_losses(model, batch, sample=label_source == "model")
    return _head_losses(model, batch, sample=label_source == "model")


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model is a causal language model, judged by its class."""
    return type(model).__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


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
        losses = _SlicedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            flat, head, targets.flatten(), sample
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
    return targets


def _hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    body = model.base_model
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
        if head is None or getattr(model, "base_model", model) is model:
            known = False
        else:
            probe = {"input_ids": batch["input_ids"][:1, :4]}
            expected = model(**probe, use_cache=False).logits.float()
            found = head(_hidden_states(model, probe)).float()
            known = expected.shape == found.shape and torch.allclose(
                expected, found, rtol=1e-2, atol=1e-2
            )
        _HEAD_IS_LAST[model] = known
    return known


class _SlicedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `head(hidden)` per position, over slices of positions.

    The gradient with respect to the hidden states is computed slice by slice along with the loss,
    so no more than SLICE_TOKENS rows of logits exist at a time. The head gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        head: nn.Module,
        targets: torch.Tensor,
        sample: bool,
    ) -> torch.Tensor:
        needs_grad = hidden.requires_grad
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.zeros_like(hidden) if needs_grad else None
        for start in range(0, len(hidden), SLICE_TOKENS):
            rows = slice(start, start + SLICE_TOKENS)
            if bool((targets[rows] == IGNORED).all()):
                continue
            part = hidden[rows].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                part_losses = _cross_entropy(head(part), targets[rows], sample)
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
        return gradient * grad_outputs[0][:, None].to(gradient.dtype), None, None, None


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
    if "start_positions" in batch or "end_positions" in batch:
        return _span_losses(model, batch, sample)
    labels = batch.get("labels")
    needs_labels = is_encoder_decoder(model)
    if labels is None and (not sample or needs_labels):
        raise DataError(
            f"The batches have no 'labels', which {type(model).__name__} needs; add them or set "
            "label_source='model'."
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
    if logits.shape[-1] == 1:
        prediction = logits.squeeze(-1)
        if sample:
            # Variance 1/2 makes the expected squared gradient equal the second derivative, 2.
            labels = prediction.detach() + torch.randn_like(prediction) * 0.5**0.5
        return F.mse_loss(prediction, labels.float().view_as(prediction), reduction="none")
    if getattr(_config(model), "problem_type", None) == "multi_label_classification":
        labels = torch.bernoulli(logits.detach().sigmoid()) if sample else labels
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        return losses.mean(dim=-1)
    return _cross_entropy(logits, labels.view(-1).long(), sample)


def _span_losses(model: nn.Module, batch: Batch, sample: bool) -> ItemLosses:
    positions = ("start_positions", "end_positions")
    outputs = model(**{name: value for name, value in batch.items() if name not in positions})
    pairs = zip((outputs.start_logits, outputs.end_logits), positions, strict=True)
    losses = [_cross_entropy(logits, batch[name].view(-1), sample) for logits, name in pairs]
    total = (losses[0] + losses[1]) / 2
    return ItemLosses(total, torch.ones(len(total), dtype=torch.long, device=total.device))


def _config(model: nn.Module) -> object:
    return getattr(model, "config", None)

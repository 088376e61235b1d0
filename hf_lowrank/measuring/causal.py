"""Losses of causal language models, over slices of positions: never all logits of a vocabulary."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring.batches import follows_from
from hf_lowrank.measuring.items import (
    IGNORED,
    Batch,
    ItemLosses,
    cross_entropy,
    eval_mode,
    inner_model,
    is_causal_lm,
    without_labels,
)

SLICE_TOKENS = 512
_INPUTS = ("input_ids", "inputs_embeds")

_HEAD_IS_LAST: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def causal_losses(model: nn.Module, batch: Batch, sample: bool) -> ItemLosses:
    """Loss of the next token at each position; labels may be sampled from the model."""
    targets = _next_tokens(batch)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head_is_last(model, batch):
        hidden = last_states(model, batch)
        flat = hidden.reshape(-1, hidden.shape[-1])
        losses = _SlicedLoss.apply(  # type: ignore[no-untyped-call]
            flat, head, targets.flatten(), partial(cross_entropy, sample=sample), None
        )
    else:
        # The model changes its logits after the head (a soft cap, a scale): use them as they are.
        logits = model(**without_labels(batch), use_cache=False).logits
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), sample)
    per_position = cast(torch.Tensor, losses).view(targets.shape)
    return ItemLosses(per_position.sum(dim=1), (targets != IGNORED).sum(dim=1))


def _next_tokens(batch: Batch) -> torch.Tensor:
    """Target of each position, shape (batch, length): the next label, IGNORED at the end."""
    labels = batch.get("labels")
    targets = torch.full_like(batch["input_ids"] if labels is None else labels, IGNORED)
    if labels is not None:
        targets[:, :-1] = labels[:, 1:]
        return targets
    following, scored = batch["input_ids"][:, 1:], follows_from(batch)
    targets[:, :-1] = following if scored is None else following.masked_fill(~scored, IGNORED)
    return targets


def last_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What the layers below the head hand to it, shape (batch, length, hidden)."""
    body = inner_model(model).base_model
    hidden: torch.Tensor = body(**without_labels(batch), use_cache=False)[0]  # type: ignore[operator]
    return hidden


@torch.no_grad()
def head_is_last(model: nn.Module, batch: Batch) -> bool:
    """Whether the logits are exactly head(hidden states); found out once for each model."""
    known = _HEAD_IS_LAST.get(model)
    if known is None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        inner = inner_model(model)
        if head is None or getattr(inner, "base_model", inner) is inner:
            known = False
        else:
            device = next(model.parameters()).device
            probe = {k: batch[k][:1, :4].to(device) for k in _INPUTS if k in batch}
            # Accelerate's mixed precision rounds the logits, compiled kernels do so differently.
            forward = getattr(model, "_original_forward", getattr(model, "_orig_mod", model))
            with eval_mode(model):
                expected = forward(**probe, use_cache=False).logits.float()
                found = head(last_states(model, probe)).float()
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
    if not (is_causal_lm(model) and head_is_last(model, batch)):
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
    return last_states(model, batch)


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

"""Losses of causal language models, over slices of positions: never all logits of a vocabulary."""

from __future__ import annotations

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
    is_causal_lm,
    without_labels,
)
from hf_lowrank.measuring.own_loss import label_places
from hf_lowrank.measuring.projection import Projection, last_states, projection

SLICE_TOKENS = 512


def causal_losses(model: nn.Module, batch: Batch, sample: bool) -> ItemLosses:
    """Loss of the next token at each position; labels may be sampled from the model."""
    targets = _targets(batch, label_places(model, batch).shifted)
    project = projection(model, batch)
    if project is not None:
        hidden = last_states(model, batch)
        flat = hidden.reshape(-1, hidden.shape[-1])
        losses = _SlicedLoss.apply(  # type: ignore[no-untyped-call]
            flat, project, targets.flatten(), partial(cross_entropy, sample=sample), None
        )
    else:
        logits = model(**without_labels(batch), use_cache=False).logits
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), sample)
    per_position = cast(torch.Tensor, losses).view(targets.shape)
    return ItemLosses(per_position.sum(dim=1), (targets != IGNORED).sum(dim=1))


def _targets(batch: Batch, shifted: bool) -> torch.Tensor:
    """Target of each position, shape (batch, length): the next token, IGNORED at the end.

    Labels are shifted in the same way, unless the model's own are not.
    """
    labels = batch.get("labels")
    if labels is not None and not shifted:
        return labels
    targets = torch.full_like(batch["input_ids"] if labels is None else labels, IGNORED)
    if labels is not None:
        targets[:, :-1] = labels[:, 1:]
        return targets
    following, scored = batch["input_ids"][:, 1:], follows_from(batch)
    targets[:, :-1] = following if scored is None else following.masked_fill(~scored, IGNORED)
    return targets


class _SlicedLoss(torch.autograd.Function):
    """A loss of `project(hidden)` per position, over slices of positions.

    The gradient with respect to the hidden states is computed slice by slice along with the loss,
    so no more than SLICE_TOKENS rows of logits exist at a time. The head gets no gradient. With a
    teacher's hidden states the loss also sees `project(teacher)` of the slice.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        project: Projection,
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
            extra = () if teacher is None else (project(teacher[rows]),)
            with torch.set_grad_enabled(needs_grad):
                part_losses = loss(project(part), targets[rows], *extra)
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
        ConfigError: The model is no causal language model, or its logits are not made of its last
            hidden states by the head, position by position.
    """
    _projection(model, batch)


def _projection(model: nn.Module, batch: Batch) -> Projection:
    project = projection(model, batch) if is_causal_lm(model) else None
    if project is None:
        raise ConfigError(
            f"{type(model).__name__}: distillation needs a causal language model whose logits are "
            "its head applied to the last hidden states; leave out recover_steps."
        )
    return project


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
    hidden, targets = (
        hidden_states(model, batch),
        _targets(batch, label_places(model, batch).shifted),
    )
    losses = _SlicedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]),
        _projection(model, batch),
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

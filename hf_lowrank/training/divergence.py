"""How far two predictions on one batch are apart, for the tasks that an encoder is tuned on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring.heads import problem_type
from hf_lowrank.measuring.items import IGNORED, is_causal_lm, is_encoder_decoder


def check_comparable(model: nn.Module) -> None:
    """Refuses models whose predictions `divergence` does not compare.

    Raises:
        ConfigError: The model writes text.
    """
    if is_causal_lm(model) or is_encoder_decoder(model):
        raise ConfigError(
            f"Mixed ranks and distillation compare predictions of classes, numbers or spans; "
            f"{type(model).__name__} writes text. Fine-tune it with Trainer."
        )


def divergence(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    target: Any,  # noqa: ANN401
    other: Any,  # noqa: ANN401
    *,
    temperature: float = 1.0,
    symmetric: bool = False,
) -> torch.Tensor:
    """Mean divergence of one model output from another.

    Classes: `KL(target || other)` of the class distributions, nats, averaged over sequences, or
    over labelled tokens. Several labels: the same of each label's yes and no. Spans: mean of the
    divergences of start and end. Regression: mean squared difference.

    At a temperature T the logits are divided by T and the KL is multiplied by T^2, which keeps the
    size of its gradient (Hinton et al. 2015, section 2); squared differences have none.

    Args:
        model: Whose outputs they are.
        inputs: The batch; its labels tell which tokens count and what kind of task it is.
        target: Output with the distributions that are aimed at.
        other: Output that is measured.
        temperature: T.
        symmetric: Whether to take the mean of both directions.

    Returns:
        A scalar in fp32.

    Raises:
        ConfigError: The outputs hold no logits.
    """
    if symmetric:
        forth = divergence(model, inputs, target, other, temperature=temperature)
        return (forth + divergence(model, inputs, other, target, temperature=temperature)) / 2
    if hasattr(target, "start_logits"):
        start = _kl(target.start_logits, other.start_logits, temperature).mean()
        return (start + _kl(target.end_logits, other.end_logits, temperature).mean()) / 2
    goal, found = getattr(target, "logits", None), getattr(other, "logits", None)
    if goal is None or found is None:
        raise ConfigError(f"{type(model).__name__} returns no logits; load it with its task head.")
    labels = inputs.get("labels")
    if goal.ndim == 3:
        counted = torch.ones_like(goal[..., 0]) if labels is None else (labels != IGNORED).float()
        return (_kl(goal, found, temperature) * counted).sum() / counted.sum().clamp_min(1)
    kind = "single_label_classification" if labels is None else problem_type(model, goal, labels)
    if kind == "regression":
        return F.mse_loss(found.float(), goal.float())
    if kind == "multi_label_classification":
        goal, found = (torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (goal, found))
    return _kl(goal, found, temperature).mean()


def _kl(target: torch.Tensor, other: torch.Tensor, temperature: float) -> torch.Tensor:
    """`T^2 KL(target || other)` over the last axis, from logits over T."""
    wanted, found = ((x.float() / temperature).log_softmax(dim=-1) for x in (target, other))
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(dim=-1)

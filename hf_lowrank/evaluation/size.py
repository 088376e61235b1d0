"""A model before and after: losses on the same items, parameters and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from hf_lowrank.evaluation.perplexity import LossMeasurement
from hf_lowrank.format.torchao_weights import num_bytes
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.tolerance import paired_difference
from hf_lowrank.report.sections import Evaluation, Parameters, Sizes


def compare(before: LossMeasurement, after: LossMeasurement) -> Evaluation:
    """Before and after on the same items, with the paired difference."""
    difference = paired_difference(before.items, after.items)
    return Evaluation(
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        loss_before=before.mean,
        loss_after=after.mean,
        loss_difference=difference.mean,
        standard_error=difference.standard_error,
        tokens=before.positions,
    )


def counts_left(
    dense: tuple[int, int], model: nn.Module, plan: RankPlan
) -> tuple[Parameters, Sizes]:
    """How many parameters and bytes of a model are left.

    Args:
        dense: `model_sizes` of the dense model.
        model: The compressed model.
        plan: Its ranks and narrowed layers.
    """
    parameters, size = model_sizes(model)
    counts = Parameters(dense[0], parameters, plan.dense_parameters, plan.kept_parameters)
    return counts, Sizes(dense[1], size)


def weight_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Bytes of the weights of some modules in a file."""
    weights = [cast(torch.Tensor, model.get_submodule(name).weight) for name in names]
    return sum(map(num_bytes, weights))


def model_sizes(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes in a file) of a model, each tied weight counted once."""
    parameters = list(model.parameters())  # tied weights appear once
    return (
        sum(parameter.numel() for parameter in parameters),
        sum(num_bytes(parameter) for parameter in parameters),
    )

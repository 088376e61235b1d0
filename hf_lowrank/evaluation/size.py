"""A model before and after: losses on the same items, parameters and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from hf_lowrank.evaluation.perplexity import LossMeasurement
from hf_lowrank.format.torchao_weights import num_bytes
from hf_lowrank.modeling.targets import untouched_weights
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.tolerance import paired_difference
from hf_lowrank.report.provenance import commit, hardware, versions
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


@dataclass(frozen=True)
class DenseSize:
    """What a report keeps of a model from before it is cut.

    Attributes:
        parameters: Of the whole model, tied weights once.
        bytes: Of these in a file.
        untouched: Matrices inside the blocks that are no targets, and their parameters.
    """

    parameters: int
    bytes: int
    untouched: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, targets: Mapping[str, nn.Module]) -> DenseSize:
        """Of a dense model and its target layers."""
        return cls(*model_sizes(model), untouched_weights(model, targets))


def report_fields(model: nn.Module, dense: DenseSize, plan: RankPlan) -> dict[str, Any]:
    """The fields that reports of all runs share: what is left of a model, and where it was made.

    Args:
        model: The compressed model.
        dense: The same before the cut.
        plan: Its ranks and narrowed layers.
    """
    parameters, size = model_sizes(model)
    kept = plan.dense_parameters, plan.kept_parameters
    return {
        "architecture": type(model).__name__,
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "parameters": Parameters(dense.parameters, parameters, *kept),
        "bytes": Sizes(dense.bytes, size),
        "ranks": dict(plan.ranks),
        "narrowed": dict(plan.narrowed),
        "experts": dict(plan.experts),
        "untouched": dict(dense.untouched),
    }


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

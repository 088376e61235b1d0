"""A size in megabytes: ranks and the type of the weights, chosen together.

For each type the ranks are cut so far that the file is just small enough. Which type then does best
is measured on held-out text: a type that costs fewer bits leaves more ranks, but is an error of its
own, on every weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.expert_analysis import smallest_experts
from hf_lowrank.compression.goals import smallest_share
from hf_lowrank.compression.held_out import HeldOutLoss
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.modeling.stored_size import SizeOnDisk
from hf_lowrank.modeling.surgery import factorize_, restore_
from hf_lowrank.modeling.targets import fixed_ranks
from hf_lowrank.modeling.weight_precision import planned_precisions, quantize_weights_
from hf_lowrank.ranks.plan import RankPlan, useful_rank
from hf_lowrank.report.quantization import SizeTrial

TYPES = (None, "int8", "int4")  # from the most bits to the fewest
_STEP = 1e-4  # of the kept share, at which the search for a size stops


@dataclass(frozen=True)
class Fit:
    """The largest plan of a type that fits.

    Attributes:
        weights: "int8", "int4", or None for weights as they are.
        plan: Its ranks and narrowed layers.
        size: Bytes of the file.
    """

    weights: str | None
    plan: RankPlan
    size: int


def check_size_goal(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: LowRankConfig,
    experts: Mapping[str, str | None] | None = None,
) -> None:
    """Refuses a size that even the smallest ranks and experts exceed, before any long work.

    Raises:
        ConfigError: With the size that would be reached.
    """
    if config.megabytes is None or config.ranks is not None:
        return
    shapes = {name: linear_shape(layer) for name, layer in targets.items()}
    fixed = fixed_ranks(targets, config)
    form = config.inference_form
    ranks = {name: useful_rank(shape, config.min_rank, form) for name, shape in shapes.items()}
    weights = _types(config)[-1]
    smallest = smallest_experts(model, experts or {})
    size = SizeOnDisk(model)(RankPlan(ranks | fixed, shapes, form=form, experts=smallest), weights)
    if size > config.megabytes * 1e6:
        raise ConfigError(
            f"megabytes={config.megabytes:g} is too small: with the smallest ranks in "
            f"{weights or 'its own type'} the model takes {size / 1e6:.1f} MB, embeddings and "
            "heads included; raise megabytes."
        )


def fits(model: nn.Module, analysis: Analysis) -> list[Fit]:
    """The largest plan of each type that the config leaves open and that fits.

    Fewer bits than those of a type that fits without any cut are not tried.

    Raises:
        ConfigError: None fits, because of layers that must stay dense.
    """
    config = analysis.config
    size_of, limit = SizeOnDisk(model), (config.megabytes or 0) * 1e6
    found = []
    for weights in _types(config):
        plan = _largest_plan(analysis, weights, size_of, limit)
        if plan is not None:
            found.append(Fit(weights, plan, size_of(plan, weights)))
            if plan.kept_parameters == plan.dense_parameters:
                break
    if not found:
        raise ConfigError(
            f"megabytes={config.megabytes:g} is too small with the layers that can't be cut; "
            "raise megabytes."
        )
    return found


def _types(config: LowRankConfig) -> tuple[str | None, ...]:
    return TYPES if config.weights is None else (config.weights,)


def _largest_plan(
    analysis: Analysis, weights: str | None, size_of: SizeOnDisk, limit: float
) -> RankPlan | None:
    """The largest plan within a number of bytes, None if the smallest is larger."""
    largest = analysis.plan_for_ratio(1.0)
    if size_of(largest, weights) <= limit:
        return largest
    low, high = smallest_share(analysis), 1.0
    best = analysis.plan_for_ratio(low)
    if size_of(best, weights) > limit:
        return None
    while high - low > _STEP:
        middle = (low + high) / 2
        plan = analysis.plan_for_ratio(middle)
        if size_of(plan, weights) <= limit:
            low, best = middle, plan
        else:
            high = middle
    return best


def best_fit(
    model: nn.Module, analysis: Analysis, found: list[Fit], held_out: HeldOutLoss
) -> tuple[Fit, list[SizeTrial]]:
    """The plan whose loss on held-out text is smallest, and what was measured.

    A single one is not measured.
    """
    if len(found) == 1:
        return found[0], []
    trials = []
    for each in found:
        label = f"held-out data, {each.weights or 'own type'}, ratio {each.plan.param_ratio:.3f}"
        context = applied(model, analysis, each)
        difference = held_out.compare(context, label=label)
        trials.append(SizeTrial(each.weights, each.plan.param_ratio, each.size, difference.mean))
    best = min(range(len(found)), key=lambda index: trials[index].loss_difference)
    return found[best], trials


@contextmanager
def applied(model: nn.Module, analysis: Analysis, fit: Fit) -> Iterator[nn.Module]:
    """The model cut and quantized for the time of the block, dense again afterwards.

    Args:
        model: The dense model.
        analysis: What the plan was chosen from.
        fit: A plan, and a type of weights.
    """
    dense = {name: model.get_submodule(name) for name in fit.plan.ranks}
    try:
        dense |= factorize_(model, analysis.factors, fit.plan, analysis.orders)
        if fit.weights is not None:
            precisions = planned_precisions(model, fit.plan.ranks, fit.weights)
            quantize_weights_(model, precisions)
        yield model
    finally:
        restore_(model, dense)

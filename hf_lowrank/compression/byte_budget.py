"""A size in megabytes: ranks and the types of the weights, chosen together.

Where there are prices, the type of each matrix is chosen by them, as its rank is (`byte_plan`).
Elsewhere the whole model is of one type. For each type the ranks are cut so far that the file is
just small enough, and which does best is measured on held-out text: a type that costs fewer bits
leaves more ranks, but is an error of its own, on every weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.byte_plan import mixed_plan
from hf_lowrank.compression.expert_analysis import smallest_experts
from hf_lowrank.compression.goals import smallest_share
from hf_lowrank.compression.held_out import HeldOutLoss
from hf_lowrank.compression.rounding_prices import Rounding
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.modeling.stored_size import SizeOnDisk
from hf_lowrank.modeling.surgery import factorize_, restore_
from hf_lowrank.modeling.targets import fixed_ranks
from hf_lowrank.modeling.weight_precision import Weights, planned_precisions, quantize_weights_
from hf_lowrank.ranks.plan import RankPlan, useful_rank
from hf_lowrank.report.quantization import SizeTrial

TYPES = (None, "int8", "int4")  # from the most bits to the fewest
_STEP = 1e-4  # of the kept share, at which the search for a size stops


@dataclass(frozen=True)
class Fit:
    """A plan that fits, the largest of its type.

    Attributes:
        weights: Type, or types, of the weights.
        plan: Its ranks and narrowed layers.
        size: Bytes of the file.
    """

    weights: Weights
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


def fits(
    model: nn.Module, analysis: Analysis, prices: Mapping[str, Rounding] | None = None
) -> list[Fit]:
    """The best plan of mixed types by the prices; or the largest plan of each type left open.

    Fewer bits than those of a type that fits without any cut are not tried.

    Args:
        model: The dense model.
        analysis: What plans are cut from.
        prices: Of rounding its layers, where types may be mixed.

    Raises:
        ConfigError: None fits, because of layers that must stay dense.
    """
    config = analysis.config
    size_of, limit = SizeOnDisk(model), (config.megabytes or 0) * 1e6
    found: list[Fit] = []
    if prices:
        mixed = mixed_plan(model, analysis, prices, limit)
        found += [] if mixed is None else [Fit(mixed[1], mixed[0], size_of(*mixed))]
    for weights in () if prices else _types(config):
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
        assert not isinstance(each.weights, Mapping)  # of mixed types there is one plan
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

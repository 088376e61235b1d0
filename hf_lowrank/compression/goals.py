"""From a config to a plan: the one place that knows what each goal asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_lowrank.channels.budget import channel_curve
from hf_lowrank.channels.expert_order import of_experts, of_feed_forwards
from hf_lowrank.channels.latency import smallest_time
from hf_lowrank.channels.order import channel_step
from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.feed_forward import FeedForward
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.shape_times import shape_times
from hf_lowrank.modeling.targets import fixed_ranks
from hf_lowrank.ranks.plan import RankPlan, layer_cost
from hf_lowrank.ranks.threshold import check_budget, smallest_ratio


def check_goal(targets: Mapping[str, nn.Module], config: LowRankConfig) -> None:
    """Refuses a goal that can't be met, before any long work.

    Raises:
        ConfigError: Even the smallest ranks exceed `param_ratio`, with the parameters allowed and
            needed; or narrowed layers are to be made without `channels`.
    """
    if (config.narrowed or config.experts) and not config.channels:
        raise ConfigError("To make the narrowed layers of a config again, set channels=True.")
    if config.objective == "latency":
        if config.ranks is None:
            _check_time(targets, config)
    elif config.param_ratio is not None and not config.channels_only:
        shapes = {name: linear_shape(layer) for name, layer in targets.items()}
        fixed = fixed_ranks(targets, config)
        limits: dict[str, Any] = {"min_rank": config.min_rank, "form": config.inference_form}
        check_budget(shapes, config.param_ratio, fixed=fixed, **limits)


def _check_time(targets: Mapping[str, nn.Module], config: LowRankConfig) -> None:
    # One clock for all processes, so that all refuse or none does.
    times = current_processes().decide(shape_times(targets, config.inference_form))
    fixed = fixed_ranks(targets, config)
    shapes = {name: linear_shape(layer) for name, layer in targets.items()}
    least_rank = None if config.channels_only else config.min_rank
    least = sum(
        times(shape, fixed[name])
        if name in fixed
        else times.smallest(shape, least_rank, narrows=config.channels is not False)
        for name, shape in shapes.items()
    )
    if config.param_ratio is not None and config.param_ratio < least:
        raise ConfigError(
            f"param_ratio {config.param_ratio:g} with objective 'latency': here even the smallest "
            f"ranks and widths take {least:.3f} of the dense layers' time; raise param_ratio."
        )


def check_channels(
    blocks: Iterable[FeedForward], targets: Mapping[str, nn.Module], config: LowRankConfig
) -> None:
    """Refuses a size that channels alone can't reach, before any long work.

    Args:
        blocks: The feed-forwards that may lose channels.
        targets: Target layers by name.
        config: Says whether nothing but channels is taken out.

    Raises:
        ConfigError: With the smallest size.
    """
    if not config.channels_only or config.param_ratio is None:
        return
    costs = {name: layer_cost(linear_shape(layer), None) for name, layer in targets.items()}
    dense = sum(costs.values())
    for block in blocks:
        channels = linear_shape(targets[block.output])[1]
        for name in block.names:
            costs[name] = costs[name] // channels * channel_step(channels)
    least = sum(costs.values()) / dense
    if config.param_ratio < least:
        raise ConfigError(
            f"param_ratio {config.param_ratio} can't be reached by channels alone, which leave at "
            f"least {least:.3f} of the targeted layers; raise it, or allow ranks."
        )


def plan_for_goal(analysis: Analysis) -> RankPlan | None:
    """The plan that the analysis's config asks for, None where it takes measurements to find it."""
    config = analysis.config
    if config.ranks is not None:
        narrowed = {
            name: (rows, columns) for name, (rows, columns) in (config.narrowed or {}).items()
        }
        orders = of_experts(analysis.orders)
        missing = sorted((config.experts or {}).keys() - orders.keys())
        if missing:
            raise ConfigError(
                f"{missing[0]}: the config says what is left of its experts, which this model does "
                "not have, or which can't be taken."
            )
        left = {name: (config.experts or {}).get(name, {}) for name in orders}
        experts = {
            name: order.plan(
                left[name].get("experts", order.dense[0]), left[name].get("width", order.dense[1])
            )
            for name, order in orders.items()
        }
        form = config.inference_form
        return RankPlan(config.ranks, analysis.shapes, narrowed, form, experts)
    if config.param_ratio is not None:
        return analysis.plan_for_ratio(config.param_ratio)
    if config.rank is not None:
        return analysis.plan_for_rank(config.rank)
    return None


def smallest_share(analysis: Analysis) -> float:
    """Smallest `param_ratio` that the smallest ranks, and the smallest experts, allow."""
    if (times := analysis.times) is not None:
        return smallest_time(
            analysis.shapes, analysis.spectra, analysis.orders, times, **analysis.limits
        )
    share = smallest_ratio(analysis.shapes, **analysis.limits)
    kept = share * (dense := sum(layer_cost(each, None) for each in analysis.shapes.values()))
    if analysis.config.channels_only:
        for feed_forward in of_feed_forwards(analysis.orders).values():
            costs = channel_curve(feed_forward, analysis.shapes).costs
            kept -= float(costs.max() - costs.min())
    for order in of_experts(analysis.orders).values():
        kept += order.plan(*order.sizes[0]).kept_parameters
        dense += order.plan(*order.dense).kept_parameters
    return kept / dense


def likely_ratio(analysis: Analysis) -> float:
    """The `param_ratio` of the goal, or about the size at which its tolerance is predicted.

    For a tolerance under a hundredth of a nat that of a hundredth.
    """
    config = analysis.config
    if config.param_ratio is not None:
        return config.param_ratio
    low, high = smallest_share(analysis), 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        rise = analysis.predicted_rise(analysis.plan_for_ratio(middle))
        is_within = rise <= max(config.effective_tolerance, 0.01)
        low, high = (low, middle) if is_within else (middle, high)
    return high

"""From a dense model to the orders of its fused experts: what analysis.py does, for these.

See docs/methods.md, 2.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from hf_lowrank.channels.expert_order import ExpertOrder
from hf_lowrank.channels.order import REFIT, channel_order, channel_step
from hf_lowrank.compression.cache import RunCache
from hf_lowrank.compression.groups import grouped
from hf_lowrank.compression.options import Run
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import NumericalError
from hf_lowrank.measuring.expert_moments import ExpertMoments, collect_expert_moments
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.measuring.progress import Progress
from hf_lowrank.measuring.routing import Experts
from hf_lowrank.modeling.expert_targets import experts_of
from hf_lowrank.ranks.plan import ExpertsPlan

# Of widths: grouped kernels want rows of 16 bytes, also in 16 bits.
_MULTIPLE = 8
# Tokens of the layer's mean in an expert's price, beside its own: they decide where it saw few,
# and drown in the hundreds that most see.
_DROP_TOKENS = 16.0
_LEAST = 1e-6  # tokens of an expert that saw none


def analyze_experts(
    model: nn.Module, config: LowRankConfig, run: Run, cache: RunCache | None
) -> tuple[dict[str, ExpertOrder], dict[str, str]]:
    """Orders of the run's fused experts by their name, from the cache or made anew.

    And the reasons by name against those whose prices are no numbers.

    Layers whose moments fit into `moment_gib` together share a pass over the calibration text.

    Args:
        model: The dense model; it is not changed.
        config: Damping, and the labels behind the gradients.
        run: Names the experts; calibration text, and how to work.
        cache: Where finished groups are kept, None without one.
    """
    found, failures = dict[str, ExpertOrder](), dict[str, str]()
    for group in grouped(experts_of(model, run.experts), _numbers, run.options.moment_gib):
        known = run.processes.decide(cache.read("experts", group) if cache else None)
        if known is None:
            with run.stopwatch.phase("statistics"):
                moments = _moments(model, group, config, run)
            with run.stopwatch.phase("decomposition"):
                mine = run.processes.share([*group.items()])
                orders, failed = dict[str, ExpertOrder](), dict[str, str]()
                for name, each in mine:
                    try:
                        orders[name] = order_experts(name, each, moments.pop(name), config, run)
                    except NumericalError as error:
                        failed[name] = str(error)
                known = run.processes.merge(orders), run.processes.merge(failed)
            if cache:
                cache.write("experts", group, known)
        found |= known[0]
        failures |= known[1]
    return found, failures


def _moments(
    model: nn.Module, group: Mapping[str, Experts], config: LowRankConfig, run: Run
) -> dict[str, ExpertMoments]:
    calibration = run.texts.calibration or []
    loss = run.options.loss_function or partial(item_losses, label_source=config.label_source)
    phase = f"calibrate up to {[*group][-1]}" if run.progress else None
    with Progress(phase, len(calibration)) as progress:
        return collect_expert_moments(
            model,
            group,
            calibration,
            loss,
            seed=config.seed,
            on_batch=lambda: progress.update(run.processes.count),
            processes=run.processes,
        )


def _numbers(name: str, experts: Experts) -> int:
    """Of a layer's moments; one more of the channels' stays with the order."""
    size, hidden = experts.shape.size, experts.shape.hidden
    return size.experts * (3 * size.width**2 + min(size.width, hidden) ** 2) + hidden**2


def order_experts(
    name: str, experts: Experts, moments: ExpertMoments, config: LowRankConfig, run: Run
) -> ExpertOrder:
    """A layer's experts and their channels by price.

    Args:
        name: Of the module.
        experts: The layer.
        moments: Its sums.
        config: Damping of the metric.
        run: Names the router.

    Raises:
        NumericalError: A moment holds NaN or infinity.
    """
    orders, steps, rises, refits = [], list[int](), [], []
    for expert in range(experts.shape.size.experts):
        mean = _channel_mean(moments, expert)
        curvature = _curvature(experts, moments, expert, config.output_damping)
        tokens = max(float(moments.tokens[expert]), _LEAST)
        damped = _damped(mean, config.input_damping)
        weighted = tokens / (2 * moments.losses) * (curvature @ damped)
        order, steps, rise = channel_order(damped, weighted, _MULTIPLE)
        orders.append(order.cpu())
        rises.append(rise)
        refits.append(_damped(mean, REFIT * config.input_damping).float().cpu())
    size, router = experts.shape.size, run.experts[name]
    return ExpertOrder(
        name,
        router,
        min(experts.chosen, size.experts),
        experts.shape.channel_cost,
        torch.stack(orders),
        steps,
        torch.stack(rises),
        _drop_prices(moments, config.output_damping),
        torch.stack(refits),
    )


def smallest_experts(model: nn.Module, routers: Mapping[str, str | None]) -> dict[str, ExpertsPlan]:
    """The least that can be left of experts, by name."""
    found = {}
    for name, each in experts_of(model, routers).items():
        size, cost = each.shape.size, each.shape.channel_cost
        width = channel_step(size.width, _MULTIPLE)
        dense = (size.experts, size.width)
        found[name] = ExpertsPlan(min(each.chosen, size.experts), width, dense, cost)
    return found


def _damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    found = moment.clone()
    found.diagonal().add_(damping * moment.diagonal().mean() + 1e-30)
    return found


def _channel_mean(moments: ExpertMoments, expert: int) -> torch.Tensor:
    """Mean moment of an expert's channels, fp64, with as many tokens of the layer as channels."""
    own, few = moments.channels[expert].double(), float(moments.channels.shape[1])
    layer = moments.spread[expert].double() / moments.spread_tokens[expert].clamp_min(1)
    return (own + few * layer) / (float(moments.tokens[expert]) + few)


def _curvature(
    experts: Experts, moments: ExpertMoments, expert: int, damping: float
) -> torch.Tensor:
    """`W^T G W` of an expert for its mean G, fp64, damped; with the layer's, as for channels."""
    weight = experts.output_weight(expert).double()
    own, tokens = moments.gradients[expert].double(), float(moments.tokens[expert])
    few, total = float(moments.channels.shape[1]), float(moments.tokens.sum())
    layer = moments.layer_gradients.double() / max(total, 1.0)
    if own.shape[0] == weight.shape[0]:
        own = weight.T @ own @ weight
    size = float(moments.squares[expert]) + few * float(layer.diagonal().sum())
    floor = damping * size / weight.shape[0] * (weight.T @ weight)
    return (own + few * (weight.T @ layer @ weight) + floor) / (tokens + few)


def _drop_prices(moments: ExpertMoments, damping: float) -> torch.Tensor:
    """Predicted rise of the mean loss for each expert that is dropped, nats, fp64."""
    own, tokens = moments.drops.double().cpu(), moments.tokens.double().cpu()
    summed = own[0] + damping * own[1]
    layer = summed.sum() / tokens.sum().clamp_min(1)
    shrunk = tokens * (summed + _DROP_TOKENS * layer) / (tokens + _DROP_TOKENS)
    return shrunk / moments.losses

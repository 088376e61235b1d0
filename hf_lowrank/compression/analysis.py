"""From a dense model to the spectra of its layers: the part of a run that all goals share."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from hf_lowrank.channels.budget import plan_with_channels, predicted_rise_with_channels
from hf_lowrank.channels.expert_order import Orders
from hf_lowrank.channels.latency import plan_for_latency
from hf_lowrank.channels.order import ChannelOrder, order_channels
from hf_lowrank.compression.cache import RunCache
from hf_lowrank.compression.expert_analysis import analyze_experts
from hf_lowrank.compression.gradients import Gradients, metric_settings, take_gradients
from hf_lowrank.compression.groups import Group, moment_groups
from hf_lowrank.compression.options import Run
from hf_lowrank.compression.prices import (
    HeldOutPrices,
    enough,
    measure_prices,
    priced,
    standard_error,
)
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.decomposition.moments import Moments
from hf_lowrank.decomposition.spectrum import Factors, Spectrum, decompose
from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.format.feed_forward import FeedForward, find_feed_forwards
from hf_lowrank.measuring.batches import num_tokens
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.progress import Progress, track
from hf_lowrank.measuring.shape_times import ShapeTimes, shape_times
from hf_lowrank.modeling.targets import fixed_ranks
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.threshold import plan_for_budget, uniform_plan
from hf_lowrank.report.sections import MeasuredPart


@dataclass
class Analysis:
    """Spectra and factors of all target layers, from which any plan is cut.

    Attributes:
        config: The goal and the settings; see `with_config`.
        shapes: (out_features, in_features) of every target layer.
        spectra: Spectrum by layer name; a layer whose decomposition failed is missing.
        factors: Factors of the layers that have a spectrum.
        failures: Reason by layer name, for layers that stay dense because of a failure.
        fixed: Ranks fixed by `rank_pattern`, and None for the failures.
        tokens: Calibration tokens used.
        orders: Channel order of each feed-forward, keyed by its output layer, and order of each
            layer's fused experts; empty unless `channels`.
        gradients: What the joint system reads, where it was asked for.
        held_out: What cuts do to held-out text, with `measured_prices`.
        times: What shapes take to run, with objective "latency".
        coherence: By layer name, once the prices are those of held-out text; see `priced`.
    """

    config: LowRankConfig
    shapes: dict[str, tuple[int, int]]
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    factors: Mapping[str, Factors] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, int | None] = field(default_factory=dict)
    tokens: int = 0
    orders: Orders = field(default_factory=dict)
    gradients: Gradients = field(default_factory=Gradients)
    held_out: HeldOutPrices | None = None
    times: ShapeTimes | None = None
    coherence: dict[str, float] = field(default_factory=dict)

    def with_config(self, config: LowRankConfig) -> Analysis:
        """Another goal on the same spectra."""
        return dataclasses.replace(self, config=config)

    def plan_for_ratio(self, param_ratio: float) -> RankPlan:
        """Plan within a budget by the config's rule; see `plan_for_budget`."""
        shapes, spectra, config = self.shapes, self.spectra, self.config
        if self.times is not None:
            orders, times = self.orders, self.times
            return plan_for_latency(shapes, spectra, orders, param_ratio, times, **self.limits)
        if config.channels:
            return plan_with_channels(shapes, spectra, self.orders, param_ratio, **self.limits)
        return plan_for_budget(shapes, spectra, config.effective_rule, param_ratio, **self.limits)

    @property
    def limits(self) -> dict[str, Any]:
        """What all plans have in common: `min_rank`, `fixed` and `form`."""
        config = self.config
        least = sys.maxsize if config.channels_only else config.min_rank  # more than any layer has
        return {"min_rank": least, "fixed": self.fixed, "form": config.inference_form}

    def plan_for_rank(self, rank: int) -> RankPlan:
        """The same rank everywhere, but for `rank_pattern`."""
        return uniform_plan(self.shapes, rank, self.fixed, self.config.inference_form)

    def predicted_rise(self, plan: RankPlan) -> float:
        """Predicted rise of the mean loss under a plan, nats; NaN where the metric has none."""
        return predicted_rise_with_channels(self.spectra, self.orders, plan)

    def priced(
        self, plan: RankPlan, parts: Iterable[Sequence[str]]
    ) -> tuple[Analysis, list[MeasuredPart]]:
        """The same with prices from held-out text, and how far they are off those before.

        Args:
            plan: About what will be chosen.
            parts: Names of the layers of each part of the model.
        """
        assert self.held_out is not None  # measured for this config
        found = priced(self.spectra, self.orders, self.held_out, plan, parts)
        other = dataclasses.replace(
            self, spectra=found.spectra, orders=found.orders, coherence=found.coherence
        )
        return other, found.parts

    def standard_error(self, plan: RankPlan) -> float | None:
        """That of `predicted_rise` over held-out items, nats; None without prices from these."""
        if self.held_out is None or not self.coherence:
            return None
        error = standard_error(self.held_out, self.coherence, self.orders, plan)
        return None if math.isnan(error) else error


def analyze(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: LowRankConfig,
    run: Run | None = None,
    *,
    with_gradients: bool = False,
) -> Analysis:
    """Collects the moments that the config's metric needs and decomposes every target layer.

    If the moments of all layers together would not fit into `moment_gib`, the layers are taken in
    groups, each with a pass over the calibration data of its own.

    Args:
        model: The dense model; it is not changed.
        targets: Its target layers by name, from `find_targets`.
        config: What to do.
        run: Calibration text, and how to work; with a `cache_dir` finished groups are kept there,
            so that a killed or repeated run goes on from them. Processes share the calibration
            batches and the layers out among them; the main one alone reads and writes the cache.
        with_gradients: Whether to keep the mean gradients, too; cached spectra are then made
            again.

    Raises:
        DataError: The metric needs calibration data and there is none.
        TargetError: Channels are asked for and there is no feed-forward of a known kind.
    """
    run = run or Run()
    metric, calibration = METRICS[config.metric], run.texts.calibration
    if metric.needs and not calibration:
        raise DataError(
            f"metric {config.metric!r} needs calibration data; pass some, or use metric 'plain'."
        )
    blocks = find_feed_forwards(model, targets, run.experts) if config.channels else []
    needs = metric.needs | ({"gradient"} if with_gradients else frozenset())
    cache = _cache(model, config, run)
    found = Analysis(config, {name: linear_shape(layer) for name, layer in targets.items()})
    for layers in moment_groups(targets, needs, run.options.moment_gib, [b.output for b in blocks]):
        group = Group(layers, [b for b in blocks if b.output in layers], needs)
        _analyze_group(model, group, cache, found, run, with_gradients)
    if config.channels:
        experts, failed = analyze_experts(model, config, run, cache)
        found.orders = {**found.orders, **experts}
        found.failures |= failed
    found.fixed = fixed_ranks(targets, config)
    found.fixed |= dict.fromkeys(found.failures.keys() & found.shapes.keys())
    found.tokens = sum(num_tokens(batch) for batch in calibration or [])
    if config.objective == "latency" and config.ranks is None:
        found.times = run.processes.decide(shape_times(targets, config.inference_form))
    if config.measured_prices and config.ranks is None:
        with run.stopwatch.phase("prices"):
            found.held_out = measure_prices(
                model,
                found.factors,
                found.orders,
                enough(run.texts.held_out or []),
                loss_function=run.options.loss_function,
                seed=config.seed,
                processes=run.processes,
                progress=run.progress,
            )
    return found


def _cache(model: nn.Module, config: LowRankConfig, run: Run) -> RunCache | None:
    """The run's cache, None without one and on all processes but the main one."""
    folder = run.options.cache_dir
    if folder is None or not run.processes.is_main:
        return None
    calibration = run.texts.calibration or []
    return RunCache(Path(folder), model, calibration, config, run.options.loss_function)


def _analyze_group(
    model: nn.Module,
    group: Group,
    cache: RunCache | None,
    found: Analysis,
    run: Run,
    with_gradients: bool,
) -> None:
    """Adds what is known of a group of layers to an analysis, from the cache or made anew."""
    cached = run.processes.decide(None if with_gradients else _read_cache(cache, group))
    if cached is None:
        with run.stopwatch.phase("statistics"):
            moments = _moments(model, group, found.config, cache, run)
        if with_gradients:
            found.gradients |= take_gradients(moments, metric_settings(found.config))
        with run.stopwatch.phase("decomposition"):
            cached = _decompose_group(model, group, moments, found.config, run)
        if cache:
            with run.stopwatch.phase("cache"):
                cache.write("spectra", group.names, cached[:3])
                if group.blocks:
                    cache.write("channels", group.whole, cached.orders)
    found.spectra |= cached.spectra
    found.factors = {**found.factors, **cached.factors}
    found.failures |= cached.failures
    found.orders = {**found.orders, **cached.orders}


class Decomposed(NamedTuple):
    """What is made of some layers, by layer name; see the fields of `Analysis`."""

    spectra: dict[str, Spectrum]
    factors: dict[str, Factors]
    failures: dict[str, str]
    orders: dict[str, ChannelOrder]


def _read_cache(cache: RunCache | None, group: Group) -> Decomposed | None:
    """What is known of a group of layers, or None if any of it is missing."""
    if cache is None:
        return None
    found = cache.read("spectra", group.names)
    orders = cache.read("channels", group.whole) if group.blocks else {}
    if found is None or orders is None:
        return None
    spectra, factors, failures = found
    return Decomposed(spectra, factors, failures, orders)


def _decompose_group(
    model: nn.Module, group: Group, moments: dict[str, Moments], config: LowRankConfig, run: Run
) -> Decomposed:
    """Decomposes a group of layers, each process its share; all processes get all results."""
    mine = dict(run.processes.share(list(group.layers.items())))
    blocks = [block for block in group.blocks if block.output in mine]
    orders = _order_channels(model, blocks, moments, config)
    parts = decompose_layers(mine, moments, config, run.progress)
    merge = run.processes.merge
    return Decomposed(merge(parts[0]), merge(parts[1]), merge(parts[2]), merge(orders))


def _order_channels(
    model: nn.Module,
    blocks: Sequence[FeedForward],
    moments: Mapping[str, Moments],
    config: LowRankConfig,
) -> dict[str, ChannelOrder]:
    """Channel order of each feed-forward whose channels have a price, keyed by its output layer."""
    metric, settings = METRICS[config.metric], metric_settings(config)
    orders: dict[str, ChannelOrder] = {}
    for block in blocks:
        found = moments[block.output]
        assert found.input_whole is not None  # collected for these layers
        try:
            form = metric.form(found, settings)
            order = order_channels(model, block, found.input_whole, form)
        except NumericalError:
            continue  # its decomposition fails for the same reason, which is then reported
        if order is not None:
            orders[block.output] = order
    return orders


def decompose_layers(
    layers: Mapping[str, nn.Module],
    moments: dict[str, Moments],
    config: LowRankConfig,
    progress: bool = True,
) -> tuple[dict[str, Spectrum], dict[str, Factors], dict[str, str]]:
    """Spectra and factors by layer name, and the reasons of those that failed.

    Frees each layer's moments as soon as they are used.
    """
    metric = METRICS[config.metric]
    settings = metric_settings(config)
    spectra: dict[str, Spectrum] = {}
    factors: dict[str, Factors] = {}
    failures: dict[str, str] = {}
    for name in track(layers, "decompose" if progress else None, "layers"):
        try:
            form = metric.form(moments.pop(name), settings)
            spectra[name], factors[name] = decompose(linear_weight(layers[name]), form)
        except NumericalError as error:
            failures[name] = str(error)
    return spectra, factors, failures


def _moments(
    model: nn.Module, group: Group, config: LowRankConfig, cache: RunCache | None, run: Run
) -> dict[str, Moments]:
    """Moments of a group of layers, from the cache or by a pass over the calibration data."""
    names, needs, calibration = group.names, group.needs, run.texts.calibration
    if not needs or calibration is None:
        return {name: Moments() for name in names}
    even = METRICS[config.metric].even
    entry = [*names, *sorted(needs), *(f"{name}/whole" for name in group.whole)]
    entry += ["even"] if even else []
    cached: dict[str, Moments] | None = run.processes.decide(
        cache.read("moments", entry) if cache else None
    )
    if cached is not None:
        return cached
    phase = f"calibrate up to {names[-1]}" if run.progress else None
    with Progress(phase, len(calibration)) as progress:
        moments = collect_moments(
            model,
            group.layers,
            calibration,
            needs,
            loss_function=run.options.loss_function,
            whole=group.whole,
            even=even,
            label_source=config.label_source,
            seed=config.seed,
            on_batch=lambda: progress.update(run.processes.count),
            processes=run.processes,
        )
    if cache:
        cache.write("moments", entry, moments)
    return moments

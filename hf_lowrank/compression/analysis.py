"""From a dense model to the spectra of its layers: the part of a run that all goals share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import nn
from tqdm.auto import tqdm

from hf_lowrank.channels.budget import plan_with_channels, predicted_rise_with_channels
from hf_lowrank.channels.order import ChannelOrder, order_channels
from hf_lowrank.compression.cache import RunCache
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS, MetricSettings
from hf_lowrank.decomposition.moments import Moments
from hf_lowrank.decomposition.spectrum import Spectrum, decompose
from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.format.feed_forward import FeedForward, find_feed_forwards
from hf_lowrank.format.modeling_lowrank import linear_shape, linear_weight
from hf_lowrank.measuring.batches import num_tokens
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.distributed import ALONE, Processes
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.modeling.targets import find_targets, fixed_ranks
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.threshold import plan_for_budget, uniform_plan

BYTES_PER_MOMENT = 4
SECOND_MOMENTS = frozenset({"input", "input_centred", "output"})
DEFAULT_MOMENT_GIB = 8.0

# Spectra, reasons of failures and channels of a group of layers, by layer name.
GroupResult = tuple[dict[str, Spectrum], dict[str, str], dict[str, ChannelOrder]]


class Stopwatch:
    """Adds up seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the block towards a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class Analysis:
    """Spectra of all target layers, from which any plan is cut.

    Attributes:
        config: The settings that the spectra were made with.
        shapes: (out_features, in_features) of every target layer.
        spectra: Spectrum by layer name; a layer whose decomposition failed is missing.
        failures: Reason by layer name, for layers that stay dense because of a failure.
        fixed: Ranks fixed by `rank_pattern`, and None for the failures.
        tokens: Calibration tokens used.
        orders: Channel order of each feed-forward, keyed by its output layer; empty unless
            `channels`.
    """

    config: LowRankConfig
    shapes: dict[str, tuple[int, int]]
    spectra: dict[str, Spectrum]
    failures: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, int | None] = field(default_factory=dict)
    tokens: int = 0
    orders: dict[str, ChannelOrder] = field(default_factory=dict)

    def plan_for_ratio(self, param_ratio: float) -> RankPlan:
        """Plan within a budget by the config's rule; see `plan_for_budget`."""
        config = self.config
        if config.channels:
            return plan_with_channels(
                self.shapes,
                self.spectra,
                self.orders,
                param_ratio,
                min_rank=config.min_rank,
                fixed=self.fixed,
            )
        return plan_for_budget(
            self.shapes,
            self.spectra,
            config.effective_rule,
            param_ratio,
            min_rank=config.min_rank,
            fixed=self.fixed,
        )

    def plan_for_rank(self, rank: int) -> RankPlan:
        """The same rank everywhere, but for `rank_pattern`."""
        return uniform_plan(self.shapes, rank, self.fixed)

    def predicted_rise(self, plan: RankPlan) -> float:
        """Predicted rise of the mean loss under a plan, nats; NaN where the metric has none."""
        return predicted_rise_with_channels(self.spectra, self.orders, plan)


class MomentReader(Protocol):
    """Reads the moments of an analysis before they are decomposed and freed."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of `Moments` fields to collect besides those of the metric."""

    def read(self, moments: Mapping[str, Moments]) -> None:
        """Gets the moments of each group of layers by name; may take its own out of them."""


def analyze(
    model: nn.Module,
    config: LowRankConfig,
    calibration: Sequence[Batch] | None = None,
    *,
    loss_function: LossFunction | None = None,
    cache: RunCache | None = None,
    stopwatch: Stopwatch | None = None,
    moment_gib: float = DEFAULT_MOMENT_GIB,
    progress: bool = True,
    processes: Processes = ALONE,
    reader: MomentReader | None = None,
) -> Analysis:
    """Collects the moments that the config's metric needs and decomposes every target layer.

    If the moments of all layers together would not fit into `moment_gib`, the layers are taken in
    groups, each with a pass over the calibration data of its own.

    Args:
        model: The dense model; it is not changed.
        config: What to do.
        calibration: Batches of forward inputs; may be None for the `plain` metric.
        loss_function: Loss of a batch; by default the model's own task loss.
        cache: Where to keep finished groups, so that a killed or repeated run goes on from there.
        stopwatch: Adds up the phases "statistics" and "decomposition".
        moment_gib: Memory for moments, GiB.
        progress: Whether to show progress bars.
        processes: Those that share the calibration batches and the layers out among them; the main
            one alone reads and writes the cache.
        reader: Sees all moments; cached spectra are then made again.

    Raises:
        DataError: The metric needs calibration data and there is none.
        TargetError, ConfigError: See `find_targets`.
    """
    targets = find_targets(model, config)
    metric = METRICS[config.metric]
    if metric.needs and not calibration:
        raise DataError(
            f"metric {config.metric!r} needs calibration data; pass some, or use metric 'plain'."
        )
    stopwatch = stopwatch or Stopwatch()
    blocks = find_feed_forwards(model, targets) if config.channels else []
    result = Analysis(config, {n: linear_shape(m) for n, m in targets.items()}, {})
    progress, cache = progress and processes.is_main, cache if processes.is_main else None
    outputs = [block.output for block in blocks]
    needs = metric.needs | (reader.needs if reader else frozenset())
    for group in _groups(targets, needs, moment_gib, outputs):
        names, inside = list(group), [block for block in blocks if block.output in group]
        cached = processes.decide(None if reader else _read_cache(cache, names, inside))
        if cached is None:
            with stopwatch.phase("statistics"):
                moments = _moments(
                    model,
                    group,
                    calibration,
                    needs,
                    config,
                    loss_function,
                    cache,
                    progress,
                    processes,
                    [block.output for block in inside],
                )
            if reader:
                reader.read(moments)
            with stopwatch.phase("decomposition"):
                cached = _decompose_group(
                    model, group, inside, moments, config, progress, processes
                )
            if cache:
                with stopwatch.phase("cache"):
                    cache.write_spectra(names, *cached[:2])
                    if inside:
                        cache.write_orders(inside, cached[2])
        result.spectra |= cached[0]
        result.failures |= cached[1]
        result.orders |= cached[2]
    result.fixed = fixed_ranks(targets, config) | dict.fromkeys(result.failures)
    result.tokens = sum(num_tokens(batch) for batch in calibration or [])
    return result


def _decompose_group(
    model: nn.Module,
    group: Mapping[str, nn.Module],
    blocks: Sequence[FeedForward],
    moments: dict[str, Moments],
    config: LowRankConfig,
    progress: bool,
    processes: Processes,
) -> GroupResult:
    """Decomposes a group of layers, each process its share; all processes get all results."""
    mine = dict(processes.share(list(group.items())))
    orders = _order_channels(model, [b for b in blocks if b.output in mine], moments, config)
    spectra, failures = decompose_layers(mine, moments, config, progress)
    return processes.merge(spectra), processes.merge(failures), processes.merge(orders)


def _read_cache(
    cache: RunCache | None, names: list[str], blocks: Sequence[FeedForward]
) -> GroupResult | None:
    """Spectra, failures and channels of a group of layers, or None if any are missing."""
    spectra = cache.read_spectra(names) if cache else None
    if cache is None or spectra is None:
        return None
    orders = cache.read_orders(blocks) if blocks else {}
    return None if orders is None else (*spectra, orders)


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
) -> tuple[dict[str, Spectrum], dict[str, str]]:
    """Spectra by layer name, and the reasons of those that failed.

    Frees each layer's moments as soon as they are used.
    """
    metric = METRICS[config.metric]
    settings = metric_settings(config)
    spectra: dict[str, Spectrum] = {}
    failures: dict[str, str] = {}
    bar = tqdm(layers.items(), desc="decompose", disable=None if progress else True, leave=False)
    for name, layer in bar:
        bar.set_postfix_str(name)
        try:
            form = metric.form(moments.pop(name), settings)
            spectra[name] = decompose(linear_weight(layer), form)
        except NumericalError as error:
            failures[name] = str(error)
    return spectra, failures


def metric_settings(config: LowRankConfig) -> MetricSettings:
    """The numbers that metrics read, from the config."""
    return MetricSettings(config.input_damping, config.output_damping, config.activation_alpha)


def _moments(
    model: nn.Module,
    group: Mapping[str, nn.Module],
    calibration: Sequence[Batch] | None,
    needs: frozenset[str],
    config: LowRankConfig,
    loss_function: LossFunction | None,
    cache: RunCache | None,
    progress: bool,
    processes: Processes,
    whole: Sequence[str],
) -> dict[str, Moments]:
    """Moments of a group of layers, from the cache or by a pass over the calibration data."""
    names = list(group)
    if not needs or calibration is None:
        return {name: Moments() for name in group}
    cached = processes.decide(cache.read_moments(names, needs, whole) if cache else None)
    if cached is not None:
        return cached
    description = f"calibrate ... {names[-1]}"
    with tqdm(
        total=len(calibration), desc=description, disable=None if progress else True, leave=False
    ) as bar:
        moments = collect_moments(
            model,
            group,
            calibration,
            needs,
            loss_function=loss_function,
            whole=whole,
            label_source=config.label_source,
            seed=config.seed,
            on_batch=partial(bar.update, processes.count),
            processes=processes,
        )
    if cache:
        cache.write_moments(names, needs, moments, whole)
    return moments


def _groups(
    targets: Mapping[str, nn.Module],
    needs: frozenset[str],
    moment_gib: float,
    whole: Sequence[str] = (),
) -> list[dict[str, nn.Module]]:
    """Consecutive layers whose moments fit into memory together; at least one layer each."""
    limit = moment_gib * 2**30
    groups: list[dict[str, nn.Module]] = [{}]
    used = 0.0
    for name, layer in targets.items():
        rows, columns = linear_shape(layer)
        size = BYTES_PER_MOMENT * (
            len(needs & SECOND_MOMENTS) * min(rows, columns) ** 2
            + ("gradient" in needs) * rows * columns
            + 2 * (name in whole) * columns**2  # one stays with the channels' order
        )
        if groups[-1] and used + size > limit:
            groups.append({})
            used = 0.0
        groups[-1][name] = layer
        used += size
    return groups

"""What a matrix of some shape costs to run: measured for the shapes at hand, on this machine.

A low-rank layer of half the numbers need not take half the time: every product has a fixed cost,
and narrow ones run below a processor's best rate. So the shapes are timed as they will be run, and
between the measured ranks and widths times are interpolated.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.format.forms.stored_form import stored_form
from hf_lowrank.ranks.plan import RankPlan

Shape = tuple[int, int]
Points = Mapping[int, float]

PHASES = {"decode": 1, "prefill": 256}
"""Rows of the input by phase: one token after another, and a prompt at once."""

_STEPS = (0.125, 0.25, 0.5, 0.75)
_ROUNDS, _SECONDS = 7, 0.2
_GAIN = 0.95  # less than 5 % of a layer's time is no gain but noise


@dataclass(frozen=True)
class ShapeTimes:
    """Time of layers as a share of that of all dense ones together, the phases counting alike.

    Attributes:
        dense: Seconds of a dense layer by phase and shape.
        ranked: Seconds by rank, by phase and shape.
        rows: Seconds of a dense layer narrowed to some outputs, by phase and shape.
        columns: The same for inputs.
        totals: Seconds of all dense layers by phase.
    """

    dense: Mapping[str, Mapping[Shape, float]]
    ranked: Mapping[str, Mapping[Shape, Points]]
    rows: Mapping[str, Mapping[Shape, Points]]
    columns: Mapping[str, Mapping[Shape, Points]]
    totals: Mapping[str, float]

    def share(self, phase: str, shape: Shape, rank: int | None) -> float:
        """Time of a layer in a phase as a share of that of all dense layers."""
        if rank is not None:
            dense = self.dense[phase][shape]
            found = _between(self.ranked[phase][shape], rank)
            # A choice among many ranks would find the one that noise favours.
            found = found if found < _GAIN * dense else max(found, dense)
        elif shape in self.dense[phase]:
            found = self.dense[phase][shape]
        else:
            found = self._narrowed(phase, shape)
        return found / self.totals[phase]

    def __call__(self, shape: Shape, rank: int | None) -> float:
        """Mean of the phases' shares."""
        return sum(self.share(phase, shape, rank) for phase in PHASES) / len(PHASES)

    def of_plan(self, plan: RankPlan) -> dict[str, float]:
        """Time of a plan's layers over that of the dense ones, by phase."""
        left = {**plan.shapes, **plan.narrowed}
        return {
            phase: sum(self.share(phase, left[name], rank) for name, rank in plan.ranks.items())
            for phase in PHASES
        }

    def smallest(self, shape: Shape, least_rank: int | None, *, narrows: bool) -> float:
        """The least that a layer can be brought to: dense, at any rank, or narrowed to one."""
        found = [self(shape, None)]
        if least_rank is not None:
            timed = {rank for each in self.ranked.values() for rank in each[shape]}
            ranks = {least_rank, *(rank for rank in timed if rank > least_rank)}
            found += [self(shape, rank) for rank in ranks]
        if narrows:
            found += [self((shape[0], 1), None), self((1, shape[1]), None)]
        return min(found)

    def _narrowed(self, phase: str, shape: Shape) -> float:
        """Of the dense layers that a narrowed one can come from, the smallest is nearest."""
        rows, columns = shape
        found = [
            (dense[0] * dense[1], _between(points[dense], shape[place]))
            for place, points in enumerate((self.rows[phase], self.columns[phase]))
            for dense in points
            if dense[1 - place] == shape[1 - place] and dense[place] > shape[place]
        ]
        if not found:
            raise ValueError(f"No layer of {rows} x {columns} or larger was timed.")
        return min(found)[1]


def _between(points: Points, place: int) -> float:
    """Linear interpolation, and beyond the ends the line through the two nearest points."""
    places = sorted(points)
    if len(places) == 1:
        return points[places[0]]
    after = min(max(bisect.bisect_left(places, place), 1), len(places) - 1)
    low, high = places[after - 1], places[after]
    slope = (points[high] - points[low]) / (high - low)
    return max(points[low] + slope * (place - low), 0.0)


def shape_times(targets: Mapping[str, nn.Module], form: str) -> ShapeTimes:
    """Times every kind of layer that a plan for some layers can hold, once in a process.

    Args:
        targets: Dense layers by name.
        form: Stored form of layers with a rank.
    """
    shapes = tuple(linear_shape(layer) for layer in targets.values())
    weight = linear_weight(next(iter(targets.values())))
    return _measured(shapes, form, weight.dtype, weight.device, torch.get_num_threads())


@lru_cache(maxsize=4)
@torch.inference_mode()
def _measured(
    shapes: Sequence[Shape], form: str, dtype: torch.dtype, device: torch.device, threads: int
) -> ShapeTimes:
    dense: dict[str, dict[Shape, float]] = {phase: {} for phase in PHASES}
    kinds = ("ranked", "rows", "columns")
    found: dict[str, dict[str, dict[Shape, dict[int, float]]]] = {
        kind: {phase: {} for phase in PHASES} for kind in kinds
    }
    for shape in sorted(set(shapes)):
        times = _times(_layers(shape, form, dtype, device), shape[0] * shape[1])
        for phase in PHASES:
            of_phase = {key: seconds[phase] for key, seconds in times.items()}
            dense[phase][shape] = of_phase["dense", 0]
            for kind in kinds:
                points = {size: each for (name, size), each in of_phase.items() if name == kind}
                if kind != "ranked":
                    points[shape[kind == "columns"]] = of_phase["dense", 0]
                found[kind][phase][shape] = points
    totals = {phase: sum(dense[phase][shape] for shape in shapes) for phase in PHASES}
    return ShapeTimes(dense, found["ranked"], found["rows"], found["columns"], totals)


def _layers(
    shape: Shape, form: str, dtype: torch.dtype, device: torch.device
) -> dict[tuple[str, int], nn.Module]:
    """The layers to time, by kind and rank or width."""
    rows, columns = shape

    def linear(rows: int, columns: int) -> nn.Module:
        return nn.Linear(columns, rows, bias=False, dtype=dtype)

    def sizes(whole: int) -> set[int]:
        return {max(1, int(step * whole)) for step in _STEPS}

    layers = {("dense", 0): linear(rows, columns)}
    for rank in sizes(min(shape)) | {max(1, min(shape) - 1)}:
        options = {"bias": False, "dtype": dtype}
        layers["ranked", rank] = stored_form(form).build(shape, rank, **options)
    layers |= {("rows", size): linear(size, columns) for size in sizes(rows)}
    layers |= {("columns", size): linear(rows, size) for size in sizes(columns)}
    return {key: layer.to(device) for key, layer in layers.items()}


def _times(
    layers: Mapping[tuple[str, int], nn.Module], numbers: int
) -> dict[tuple[str, int], dict[str, float]]:
    """Median seconds by phase; the layers take turns, so that what disturbs one disturbs all."""
    taken: dict[tuple[str, int], dict[str, list[float]]] = {
        key: {phase: [] for phase in PHASES} for key in layers
    }
    for phase, tokens in PHASES.items():
        repeats = 1 + min(30, int(2e7 / (numbers * tokens)))  # short ones several times in a row
        inputs = {}
        for key, layer in layers.items():
            one = next(layer.parameters())
            width = layer.in_features
            inputs[key] = torch.randn(tokens, int(width), dtype=one.dtype, device=one.device)  # type: ignore[arg-type]
        begin = time.perf_counter()
        for turn in range(1 + _ROUNDS):
            for key, layer in layers.items():
                seconds = _once(layer, inputs[key], repeats)
                if turn:
                    taken[key][phase].append(seconds)
            if turn >= 2 and time.perf_counter() - begin > _SECONDS * len(layers):
                break
    return {
        key: {phase: statistics.median(each) for phase, each in found.items()}
        for key, found in taken.items()
    }


def _once(layer: nn.Module, inputs: torch.Tensor, repeats: int) -> float:
    _finish(inputs.device)
    begin = time.perf_counter()
    for _ in range(repeats):
        layer(inputs)
    _finish(inputs.device)
    return (time.perf_counter() - begin) / repeats


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()

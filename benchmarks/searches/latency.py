"""Ranks by measured latency, after HALOC."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.searches.problem import RankProblem
from hf_lowrank.ranks.hull import Point, lower_hull, slope
from hf_lowrank.ranks.plan import COMPACT, RankPlan, break_even_rank

Latency = Callable[[tuple[int, int], int | None], float]
GRID = 8
ROWS = 128
REPEATS = 5


def latency_search(problem: RankProblem, latency: Latency | None = None) -> RankPlan:
    """Components in the order of error avoided for each second added, within the budget.

    HALOC (Xiao et al., AAAI 2023): ranks come in steps to which the hardware responds, and the
    latency of each is measured for each shape of layer. Simplified: no architecture search with
    trained weights; a step is worth the truncation error that it avoids, divided by the seconds
    that it adds. The result depends on the machine, and slightly on its mood.

    Args:
        problem: What to search; `measure` and `trials` are not used.
        latency: Seconds of a layer of a shape at a rank (None: dense); by default measured here.
    """
    time_of = latency or partial(measure_latency, form=problem.form)
    tables: dict[tuple[int, int], dict[int, float]] = {}
    scores = {}
    for name, errors in problem.errors().items():
        shape = problem.shapes[name]
        if shape not in tables:
            tables[shape] = _latency_table(shape, problem.form, time_of)
        # A layer of that rank stays as it is, without error.
        dense = break_even_rank(*shape, problem.form)
        points: list[Point] = [
            (seconds, float(errors[rank]) if rank < dense else 0.0, rank)
            for rank, seconds in tables[shape].items()
        ]
        score = torch.zeros(len(errors) - 1, dtype=torch.float64)
        for before, after in itertools.pairwise(lower_hull(points)):
            score[before[2] : after[2]] = -slope(before, after)
        scores[name] = score
    return problem.plan(scores)


def _latency_table(shape: tuple[int, int], form: str, time_of: Latency) -> dict[int, float]:
    """Seconds by rank, strictly rising, from 0 to the rank where a layer is better dense."""
    limit = break_even_rank(*shape, form)
    dense = time_of(shape, None)
    table = {0: 0.0}
    for rank in sorted({max(1, limit * i // GRID) for i in range(1, GRID + 1)}):
        seconds = dense if rank >= limit else time_of(shape, rank)
        # A step that costs no time on this machine is cheap, not free.
        table[rank] = max(seconds, max(table.values()) + 1e-4 * dense)
    return table


@torch.no_grad()
def measure_latency(shape: tuple[int, int], rank: int | None, form: str = "factors") -> float:
    """Median seconds of a layer's products on 128 rows of fp32 on the CPU."""
    rows, columns = shape
    products = [(rows, columns)]
    if rank is not None and form == COMPACT:
        products = [(rank, min(shape) - rank), (max(shape), rank)]
    elif rank is not None:
        products = [(rank, columns), (rows, rank)]
    inputs = [torch.ones(ROWS, inner) for _, inner in products]
    weights = [torch.ones(outer, inner) for outer, inner in products]
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for each, weight in zip(inputs, weights, strict=True):
            _ = each @ weight.T
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[REPEATS // 2]

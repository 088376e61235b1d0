"""One threshold over all layers' component scores, and the budget version of it.

`plan_for_threshold` is the rule itself. `plan_for_budget` takes components in the order of their
scores, which is the threshold's order, until the parameter budget is spent to within one
component. Rising from the last useful rank to dense costs no more than one component and
restores all the rest; for the `price` rule, whose scores add up to a loss, such a jump may pay
from further below, so its steps follow the lower convex hull of (parameters, predicted rise).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.modeling_lowrank import break_even_rank
from hf_lowrank.ranks.plan import RankPlan, layer_cost, useful_rank
from hf_lowrank.ranks.rules import RULES

Ranks = dict[str, int | None]
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, order=True)
class _Step:
    """One way to spend parameters: raise a layer to `rank`. Ordered best first."""

    negative_score: float
    name: str
    rank: int | None = None


def plan_for_threshold(
    shapes: Shapes,
    spectra: Mapping[str, Spectrum],
    rule: str,
    threshold: float,
    *,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
) -> RankPlan:
    """Keeps component i of layer l iff its score reaches the threshold.

    Args:
        shapes: (out_features, in_features) of every targeted layer.
        spectra: Spectrum of every layer that is not in `fixed`.
        rule: Name of a rule in `RULES`.
        threshold: In the units of the rule's score.
        min_rank: Smallest rank of a factorized layer.
        fixed: Ranks decided beforehand.
    """
    ranks: Ranks = dict(fixed or {})
    for name, spectrum in spectra.items():
        if name not in ranks:
            count = int((RULES[rule](spectrum) >= threshold).sum())
            count = max(count, min(min_rank, len(spectrum.sigma)))
            ranks[name] = useful_rank(spectrum.shape, count)
    return RankPlan({name: ranks[name] for name in shapes}, dict(shapes))


def plan_for_budget(
    shapes: Shapes,
    spectra: Mapping[str, Spectrum],
    rule: str,
    param_ratio: float,
    *,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
) -> RankPlan:
    """The best-scored ranks whose parameters stay within a budget.

    Args:
        shapes: (out_features, in_features) of every targeted layer.
        spectra: Spectrum of every layer that is not in `fixed`.
        rule: Name of a rule in `RULES`.
        param_ratio: Kept / dense parameters over these layers, in (0, 1].
        min_rank: Smallest rank of a factorized layer.
        fixed: Ranks decided beforehand; they count towards the budget.

    Returns:
        A plan that keeps at most `param_ratio` of the parameters, and within one component of it
        unless every layer is dense.

    Raises:
        ConfigError: Even the smallest ranks exceed the budget.
    """
    fixed = dict(fixed or {})
    free = {name: spectrum for name, spectrum in spectra.items() if name not in fixed}
    ranks: Ranks = fixed | {
        name: useful_rank(s.shape, min(min_rank, len(s.sigma))) for name, s in free.items()
    }
    left = _left_of_budget(shapes, param_ratio, ranks, min_rank)
    if rule == "price":
        left = _spend(free, {n: _hull_steps(n, s, ranks[n]) for n, s in free.items()}, ranks, left)
    steps = {n: _component_steps(n, s, rule, ranks[n]) for n, s in free.items()}
    _spend(free, steps, ranks, left)
    return RankPlan({name: ranks[name] for name in shapes}, dict(shapes))


def check_budget(
    shapes: Shapes,
    param_ratio: float,
    *,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
) -> int:
    """Parameters that a budget leaves beside the smallest ranks.

    Raises:
        ConfigError: Even the smallest ranks exceed the budget.
    """
    ranks = {n: useful_rank(s, min(min_rank, *s)) for n, s in shapes.items()} | dict(fixed or {})
    return _left_of_budget(shapes, param_ratio, ranks, min_rank)


def _left_of_budget(
    shapes: Shapes, param_ratio: float, ranks: Mapping[str, int | None], min_rank: int
) -> int:
    needed = sum(layer_cost(shape, ranks[name]) for name, shape in shapes.items())
    budget = int(param_ratio * sum(layer_cost(shape, None) for shape in shapes.values()) + 1e-6)
    if needed > budget:
        raise ConfigError(
            f"param_ratio {param_ratio} allows {budget} parameters, but the smallest ranks "
            f"(min_rank {min_rank}, and layers fixed by rank_pattern) need {needed}; raise "
            "param_ratio."
        )
    return budget - needed


def smallest_ratio(
    shapes: Shapes, *, min_rank: int = 1, fixed: Mapping[str, int | None] | None = None
) -> float:
    """Smallest `param_ratio` that `plan_for_budget` accepts."""
    ranks = {n: useful_rank(s, min(min_rank, *s)) for n, s in shapes.items()} | dict(fixed or {})
    dense = sum(layer_cost(shape, None) for shape in shapes.values())
    return sum(layer_cost(shape, ranks[name]) for name, shape in shapes.items()) / dense


def uniform_plan(
    shapes: Shapes, rank: int, fixed: Mapping[str, int | None] | None = None
) -> RankPlan:
    """The same rank for every layer; dense where the factors would not be smaller."""
    ranks = {name: useful_rank(shape, rank) for name, shape in shapes.items()}
    return RankPlan(ranks | dict(fixed or {}), dict(shapes))


def predicted_rise(spectra: Mapping[str, Spectrum], plan: RankPlan) -> float:
    """Sum of the dropped components' prices: predicted rise of the mean loss, nats."""
    return sum(spectrum.predicted_rise(plan.ranks[n]) for n, spectrum in spectra.items())


def _spend(
    spectra: Mapping[str, Spectrum],
    steps: Mapping[str, Iterator[_Step]],
    ranks: Ranks,
    left: int,
) -> int:
    """Takes the best step that fits until none does; edits `ranks`, returns what is left."""
    heap = [step for name in spectra if (step := next(steps[name], None)) is not None]
    heapq.heapify(heap)
    while heap:
        step = heapq.heappop(heap)
        shape = spectra[step.name].shape
        cost = layer_cost(shape, step.rank) - layer_cost(shape, ranks[step.name])
        if cost > left:
            continue  # the layer's later steps are worth less and would leave a gap
        ranks[step.name] = step.rank
        left -= cost
        following = next(steps[step.name], None)
        if following is not None:
            heapq.heappush(heap, following)
    return left


def _component_steps(
    name: str, spectrum: Spectrum, rule: str, start: int | None
) -> Iterator[_Step]:
    """One component at a time, up to dense, or up to what a layer cut before still has."""
    if start is None:
        return
    scores = RULES[rule](spectrum).tolist()
    limit = break_even_rank(*spectrum.shape)
    for rank in range(start + 1, min(limit, len(scores)) + 1):
        yield _Step(-scores[rank - 1], name, useful_rank(spectrum.shape, rank))


def _hull_steps(name: str, spectrum: Spectrum, start: int | None) -> Iterator[_Step]:
    """Corners of the lower convex hull of (parameters, predicted rise), dense included."""
    if start is None or spectrum.price is None:
        return
    limit = break_even_rank(*spectrum.shape)
    tails = torch.cat([spectrum.price.flip(0).cumsum(0).flip(0), spectrum.price.new_zeros(1)])
    top = min(limit - 1, len(spectrum.sigma))
    points: list[tuple[int, float, int | None]] = [
        (layer_cost(spectrum.shape, rank), float(tails[rank]), rank)
        for rank in range(start, top + 1)
    ]
    if len(spectrum.sigma) >= limit:
        points.append((layer_cost(spectrum.shape, None), 0.0, None))
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    for before, after in itertools.pairwise(hull):
        yield _Step(_slope(before, after), name, after[2])


def _slope(before: tuple[int, float, int | None], after: tuple[int, float, int | None]) -> float:
    """Change of the predicted rise for each parameter spent; negative is good."""
    return (after[1] - before[1]) / (after[0] - before[0])

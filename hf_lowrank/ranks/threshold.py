"""One threshold over all layers' component scores, and the budget version of it.

`plan_for_threshold` is the rule itself. `plan_for_budget` takes components in the order of their
scores, which is the threshold's order, until the parameter budget is spent to within one
component. Two factors at the last useful rank cost hardly less than the dense layer, which restores
all the rest; for the `price` rule, whose scores add up to a loss, such a jump may pay from further
below, so its steps follow the lower convex hull of (parameters, predicted rise).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.hull import Point, lower_hull, slope, tail_sums
from hf_lowrank.ranks.plan import RankPlan, break_even_rank, layer_cost, useful_rank
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
    form: str = "factors",
) -> RankPlan:
    """Keeps component i of layer l iff its score reaches the threshold.

    Args:
        shapes: (out_features, in_features) of every targeted layer.
        spectra: Spectrum of every layer that is not in `fixed`.
        rule: Name of a rule in `RULES`.
        threshold: In the units of the rule's score.
        min_rank: Smallest rank of a factorized layer.
        fixed: Ranks decided beforehand.
        form: Stored form of the layers with a rank.
    """
    ranks: Ranks = dict(fixed or {})
    for name, spectrum in spectra.items():
        if name not in ranks:
            count = int((RULES[rule](spectrum, form) >= threshold).sum())
            count = max(count, min(min_rank, len(spectrum.sigma)))
            ranks[name] = useful_rank(spectrum.shape, count, form)
    return RankPlan({name: ranks[name] for name in shapes}, dict(shapes), form=form)


def plan_for_budget(
    shapes: Shapes,
    spectra: Mapping[str, Spectrum],
    rule: str,
    param_ratio: float,
    *,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
    form: str = "factors",
) -> RankPlan:
    """The best-scored ranks whose parameters stay within a budget.

    Args:
        shapes: (out_features, in_features) of every targeted layer.
        spectra: Spectrum of every layer that is not in `fixed`.
        rule: Name of a rule in `RULES`.
        param_ratio: Kept / dense parameters over these layers, in (0, 1].
        min_rank: Smallest rank of a factorized layer.
        fixed: Ranks decided beforehand; they count towards the budget.
        form: Stored form of the layers with a rank.

    Returns:
        A plan that keeps at most `param_ratio` of the parameters, and within one component of it
        unless every layer is dense.

    Raises:
        ConfigError: Even the smallest ranks exceed the budget.
    """
    free = {name: spectrum for name, spectrum in spectra.items() if name not in (fixed or {})}
    scores = {name: RULES[rule](spectrum, form) for name, spectrum in free.items()}
    tails = None
    if rule == "price":
        tails = {n: tail_sums(s.price) for n, s in free.items() if s.price is not None}
    return plan_for_scores(
        shapes, scores, param_ratio, tails=tails, min_rank=min_rank, fixed=fixed, form=form
    )


def plan_for_scores(
    shapes: Shapes,
    scores: Mapping[str, torch.Tensor],
    param_ratio: float,
    *,
    tails: Mapping[str, torch.Tensor] | None = None,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
    form: str = "factors",
) -> RankPlan:
    """Takes the best-scored components of all layers until the budget is spent.

    Args:
        shapes: (out_features, in_features) of every targeted layer.
        scores: Score of each component of every layer that is not in `fixed`, shape
            (min(m, n),); component i is never taken before component i - 1.
        param_ratio: Kept / dense parameters over these layers, in (0, 1].
        tails: Predicted rise of the loss at each rank, shape (min(m, n) + 1,). Where given, the
            budget first goes along the lower convex hull of (parameters, predicted rise).
        min_rank: Smallest rank of a factorized layer.
        fixed: Ranks decided beforehand; they count towards the budget.
        form: Stored form of the layers with a rank.

    Returns:
        As `plan_for_budget`.

    Raises:
        ConfigError: Even the smallest ranks exceed the budget.
    """
    fixed = dict(fixed or {})
    free = [name for name in scores if name not in fixed]
    ranks: Ranks = fixed | {
        name: useful_rank(shapes[name], min(min_rank, len(scores[name])), form) for name in free
    }
    left = _left_of_budget(shapes, param_ratio, ranks, min_rank, form)
    if tails is not None:
        hulls = {n: _hull_steps(n, shapes[n], tails[n], ranks[n], form) for n in free if n in tails}
        left = _spend(shapes, hulls, ranks, left, form)
    steps = {n: _component_steps(n, shapes[n], scores[n], ranks[n], form) for n in free}
    _spend(shapes, steps, ranks, left, form)
    return RankPlan({name: ranks[name] for name in shapes}, dict(shapes), form=form)


def check_budget(
    shapes: Shapes,
    param_ratio: float,
    *,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
    form: str = "factors",
) -> int:
    """Parameters that a budget leaves beside the smallest ranks.

    Raises:
        ConfigError: Even the smallest ranks exceed the budget.
    """
    ranks = _smallest_ranks(shapes, min_rank, form) | dict(fixed or {})
    return _left_of_budget(shapes, param_ratio, ranks, min_rank, form)


def _smallest_ranks(shapes: Shapes, min_rank: int, form: str) -> Ranks:
    return {n: useful_rank(s, min(min_rank, *s), form) for n, s in shapes.items()}


def _left_of_budget(
    shapes: Shapes, param_ratio: float, ranks: Mapping[str, int | None], min_rank: int, form: str
) -> int:
    needed = sum(layer_cost(shape, ranks[name], form) for name, shape in shapes.items())
    budget = int(param_ratio * sum(layer_cost(shape, None) for shape in shapes.values()) + 1e-6)
    if needed > budget:
        raise ConfigError(
            f"param_ratio {param_ratio} allows {budget} parameters, but the smallest ranks "
            f"(min_rank {min_rank}, and layers fixed by rank_pattern) need {needed}; raise "
            "param_ratio."
        )
    return budget - needed


def smallest_ratio(
    shapes: Shapes,
    *,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
    form: str = "factors",
) -> float:
    """Smallest `param_ratio` that `plan_for_budget` accepts."""
    ranks = _smallest_ranks(shapes, min_rank, form) | dict(fixed or {})
    dense = sum(layer_cost(shape, None) for shape in shapes.values())
    return sum(layer_cost(shape, ranks[name], form) for name, shape in shapes.items()) / dense


def uniform_plan(
    shapes: Shapes,
    rank: int,
    fixed: Mapping[str, int | None] | None = None,
    form: str = "factors",
) -> RankPlan:
    """The same rank for every layer; dense where that would not be smaller."""
    ranks = {name: useful_rank(shape, rank, form) for name, shape in shapes.items()}
    return RankPlan(ranks | dict(fixed or {}), dict(shapes), form=form)


def predicted_rise(spectra: Mapping[str, Spectrum], plan: RankPlan) -> float:
    """Sum of the dropped components' prices: predicted rise of the mean loss, nats."""
    return sum(spectrum.predicted_rise(plan.ranks[n]) for n, spectrum in spectra.items())


def _spend(
    shapes: Shapes,
    steps: Mapping[str, Iterator[_Step]],
    ranks: Ranks,
    left: int,
    form: str,
) -> int:
    """Takes the best step that fits until none does; edits `ranks`, returns what is left."""
    heap = [step for steps_of in steps.values() if (step := next(steps_of, None)) is not None]
    heapq.heapify(heap)
    while heap:
        step = heapq.heappop(heap)
        shape = shapes[step.name]
        cost = layer_cost(shape, step.rank, form) - layer_cost(shape, ranks[step.name], form)
        if cost > left:
            continue  # the layer's later steps are worth less and would leave a gap
        ranks[step.name] = step.rank
        left -= cost
        following = next(steps[step.name], None)
        if following is not None:
            heapq.heappush(heap, following)
    return left


def _component_steps(
    name: str, shape: tuple[int, int], scores: torch.Tensor, start: int | None, form: str
) -> Iterator[_Step]:
    """One component at a time, up to dense, or up to what a layer cut before still has."""
    if start is None:
        return
    values = scores.tolist()
    limit = break_even_rank(*shape, form)
    for rank in range(start + 1, min(limit, len(values)) + 1):
        yield _Step(-values[rank - 1], name, useful_rank(shape, rank, form))


def _hull_steps(
    name: str, shape: tuple[int, int], tails: torch.Tensor, start: int | None, form: str
) -> Iterator[_Step]:
    """Corners of the lower convex hull of (parameters, predicted rise), dense included."""
    if start is None:
        return
    limit = break_even_rank(*shape, form)
    components = len(tails) - 1
    values = tails.tolist()
    points: list[Point] = [
        (layer_cost(shape, rank, form), values[rank], rank)
        for rank in range(start, min(limit - 1, components) + 1)
    ]
    if components >= limit:
        points.append((layer_cost(shape, None), 0.0, None))
    for before, after in itertools.pairwise(lower_hull(points)):
        if slope(before, after) > 0:  # only signed predictions rise with the rank
            return
        yield _Step(slope(before, after), name, after[2])

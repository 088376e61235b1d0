"""The smallest model whose measured loss stays within a tolerance.

Bisection over the kept share of the parameters (IJCAI 2025, Algorithm 1, with its slips mended:
the last *feasible* point is returned, a falling loss is welcome). Where the metric predicts the
loss, the prediction, corrected by what was measured so far, chooses the next probe.
See docs/methods.md, 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from hf_lowrank.errors import NumericalError
from hf_lowrank.ranks.plan import RankPlan


@dataclass(frozen=True)
class LossDifference:
    """A paired comparison of two models on the same items.

    Attributes:
        mean: Rise of the mean loss, nats per scored position.
        standard_error: Standard error of the mean over items.
        items: Items measured.
        complete: Whether all items were measured; False if the outcome was clear before.
    """

    mean: float
    standard_error: float
    items: int
    complete: bool


@dataclass(frozen=True)
class Probe:
    """One step of the search.

    Attributes:
        param_ratio: Kept share of the targeted parameters.
        predicted: Predicted rise of the loss, NaN where the metric predicts none.
        measured: Measured rise of the loss, nats per token.
        standard_error: Of the measured rise.
        feasible: Whether the measured rise is within the tolerance.
        complete: Whether all held-out text was used.
    """

    param_ratio: float
    predicted: float
    measured: float
    standard_error: float
    feasible: bool
    complete: bool


def search_tolerance(
    plan_at: Callable[[float], RankPlan],
    predict: Callable[[RankPlan], float],
    measure: Callable[[RankPlan, float], LossDifference],
    tolerance: float,
    *,
    smallest: float,
    precision: float = 0.005,
    standard_error: Callable[[RankPlan], float | None] = lambda plan: None,
) -> tuple[RankPlan, list[Probe]]:
    """Finds the smallest plan that is measured to be within the tolerance.

    Args:
        plan_at: Plan for a `param_ratio`.
        predict: Predicted rise of a plan, nats, or NaN.
        measure: Measured rise of a plan; it may stop early once the rise is clearly above the
            tolerance, which is its second argument, but must be complete below it.
        tolerance: Largest allowed rise, nats per token.
        smallest: Smallest `param_ratio` that `plan_at` accepts.
        precision: The search ends when the bracket of `param_ratio` is this narrow.
        standard_error: That of a predicted rise, None if unknown. The first probe is one such
            below the prediction: where it fails, it fails early, and the next, which knows by how
            much the prediction is off, lies just above.

    Returns:
        The last feasible plan (the dense one if no smaller one is feasible) and all probes.
    """
    feasible, infeasible = 1.0, smallest
    best = plan_at(1.0)
    probes: list[Probe] = []
    known = {best.choices: True}
    bias = 1.0
    while feasible - infeasible > precision:
        expect = predict if probes else partial(_optimistic, predict, standard_error)
        ratio = _next_ratio(plan_at, expect, tolerance / bias, infeasible, feasible, len(probes))
        plan = plan_at(ratio)
        key = plan.choices
        if key in known:  # another ratio, but the same plan
            feasible, infeasible = (ratio, infeasible) if known[key] else (feasible, ratio)
            continue
        predicted, found = predict(plan), measure(plan, tolerance)
        is_feasible = known[key] = found.complete and found.mean <= tolerance
        probes.append(
            Probe(
                plan.param_ratio,
                predicted,
                found.mean,
                found.standard_error,
                is_feasible,
                found.complete,
            )
        )
        if predicted > 0 and found.mean > 0:
            bias = found.mean / predicted
        if is_feasible:
            feasible, best = ratio, plan
        else:
            infeasible = ratio
    return best, probes


def _optimistic(
    predict: Callable[[RankPlan], float],
    standard_error: Callable[[RankPlan], float | None],
    plan: RankPlan,
) -> float:
    """The prediction less its standard error, where that is known."""
    return predict(plan) - (standard_error(plan) or 0.0)


def _next_ratio(
    plan_at: Callable[[float], RankPlan],
    predict: Callable[[RankPlan], float],
    goal: float,
    infeasible: float,
    feasible: float,
    step: int,
) -> float:
    """The middle of the bracket, or where the loss is predicted to meet the goal."""
    middle = (infeasible + feasible) / 2
    # Every third probe halves the bracket, whatever the prediction says.
    if goal <= 0 or step % 3 == 2 or math.isnan(predict(plan_at(middle))):
        return middle
    low, high = infeasible, feasible
    while high - low > 1e-3:
        guess = (low + high) / 2
        low, high = (low, guess) if predict(plan_at(guess)) <= goal else (guess, high)
    margin = 0.05 * (feasible - infeasible)
    return min(max(high, infeasible + margin), feasible - margin)


def paired_difference(
    before: Sequence[tuple[float, int]],
    after: Iterable[tuple[float, int]],
    stop_above: float = math.inf,
    min_items: int = 4,
) -> LossDifference:
    """Rise of the mean loss between two models on the same items.

    Args:
        before: (summed loss, scored positions) of each item under the first model.
        after: The same under the second model, item by item; read no further than needed.
        stop_above: Stop early once the rise exceeds this by three standard errors.
        min_items: Items to read before stopping early.

    Raises:
        NumericalError: A loss is not finite.
    """
    differences: list[tuple[float, int]] = []
    for (old, count), (new, _) in zip(before, after, strict=False):
        if not (math.isfinite(old) and math.isfinite(new)):
            raise NumericalError(
                f"The loss of item {len(differences)} is not finite; load the model in float32, or "
                "leave the item out."
            )
        differences.append((new - old, count))
        if len(differences) >= min_items and len(differences) < len(before):
            mean, error = _weighted_mean(differences)
            if mean - 3 * error > stop_above:
                return LossDifference(mean, error, len(differences), False)
    if len(differences) < len(before):
        raise ValueError(
            f"{len(before)} items were measured before, but only {len(differences)} after."
        )
    mean, error = _weighted_mean(differences)
    return LossDifference(mean, error, len(differences), True)


def _weighted_mean(values: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Mean over positions and its standard error over items (ratio estimator)."""
    positions = sum(count for _, count in values)
    if not positions:
        return 0.0, math.inf
    mean = sum(total for total, _ in values) / positions
    size = len(values)
    if size < 2:
        return mean, math.inf
    residuals = sum((total - mean * count) ** 2 for total, count in values)
    return mean, math.sqrt(residuals * size / (size - 1)) / positions

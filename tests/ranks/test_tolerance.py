"""The search for the smallest feasible plan, and the paired comparison it relies on."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowrank.errors import NumericalError
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.tolerance import LossDifference, paired_difference, search_tolerance

SIZE = 2000  # one layer of 2000 x 2000: rank k keeps k / 1000 of its parameters
PRECISION = 0.005


def plan_at(ratio):
    assert 0 < ratio <= 1
    rank = int(ratio * SIZE / 2 + 1e-9)
    return RankPlan({"layer": None if rank >= SIZE // 2 else rank}, {"layer": (SIZE, SIZE)})


def no_prediction(plan):
    return math.nan


class Measure:
    """A measured rise for each kept share, and a record of the shares asked for."""

    def __init__(self, rise, complete=lambda ratio: True):
        self.rise = rise
        self.complete = complete
        self.ratios = []
        self.tolerances = set()

    def __call__(self, plan, tolerance):
        self.ratios.append(plan.param_ratio)
        self.tolerances.add(tolerance)
        return self.at(plan.param_ratio)

    def at(self, ratio):
        return LossDifference(self.rise(ratio), 0.001, 10, self.complete(ratio))


def search(measure, tolerance=0.05, predict=no_prediction, smallest=0.001, **options):
    return search_tolerance(plan_at, predict, measure, tolerance, smallest=smallest, **options)


def line(ratio):
    """Rise of the loss that meets the tolerance of 0.05 at a share of 0.6."""
    return 0.05 + (0.6 - ratio) * 0.25


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.11])
def test_the_smallest_feasible_plan_is_found_to_the_precision(tolerance):
    measure = Measure(line)
    plan, probes = search(measure, tolerance)
    border = 0.6 - (tolerance - 0.05) / 0.25
    assert border <= plan.param_ratio <= border + PRECISION + 1 / 1000
    assert measure.tolerances == {tolerance}
    assert [probe.param_ratio for probe in probes] == measure.ratios


@pytest.mark.parametrize("precision", [0.1, 0.02, 0.002])
def test_the_search_ends_at_the_precision_asked_for(precision):
    plan, probes = search(Measure(line), precision=precision)
    feasible = min(probe.param_ratio for probe in probes if probe.feasible)
    infeasible = max(probe.param_ratio for probe in probes if not probe.feasible)
    assert plan.param_ratio == feasible
    assert precision / 4 < feasible - infeasible <= precision + 2 / 1000


def test_probes_record_what_was_predicted_and_measured():
    measure = Measure(line, complete=lambda ratio: ratio > 0.4)
    _, probes = search(measure, predict=lambda plan: 1 - plan.param_ratio)
    assert {probe.feasible for probe in probes} == {True, False}
    assert {probe.complete for probe in probes} <= {True, False}
    for probe in probes:
        assert probe.predicted == 1 - probe.param_ratio
        assert probe.measured == line(probe.param_ratio)
        assert probe.standard_error == 0.001
        assert probe.complete == (probe.param_ratio > 0.4)
        assert probe.feasible == (probe.complete and probe.measured <= 0.05)


def test_without_a_prediction_the_bracket_is_halved():
    measure = Measure(line)
    search(measure, smallest=0.2)
    assert measure.ratios[:4] == pytest.approx([0.6, 0.4, 0.5, 0.55], abs=1e-3)


def test_a_rise_equal_to_the_tolerance_is_accepted():
    plan, probes = search(Measure(lambda ratio: 0.05))
    assert all(probe.feasible for probe in probes)
    assert plan.param_ratio < 0.001 + PRECISION + 1 / 1000


def test_a_fall_of_the_loss_is_accepted():
    plan, _ = search(Measure(lambda ratio: -1.0 if ratio > 0.3 else 0.2), tolerance=0.0)
    assert 0.3 <= plan.param_ratio <= 0.3 + PRECISION + 1 / 1000


@pytest.mark.parametrize("predict", [no_prediction, lambda plan: 1 - plan.param_ratio])
def test_the_dense_plan_is_left_where_nothing_is_feasible(predict):
    plan, probes = search(Measure(lambda ratio: 0.051), predict=predict)
    assert plan == plan_at(1.0)
    assert plan.ranks == {"layer": None}
    assert probes
    assert not any(probe.feasible for probe in probes)


def test_what_was_not_measured_to_the_end_is_never_feasible():
    """However low its running mean."""
    measure = Measure(lambda ratio: -1.0, complete=lambda ratio: ratio > 0.7)
    plan, _ = search(measure)
    assert 0.7 < plan.param_ratio <= 0.7 + PRECISION + 1 / 1000


def test_nan_is_never_feasible():
    plan, _ = search(Measure(lambda ratio: math.nan))
    assert plan == plan_at(1.0)


def bound_on_probes(smallest, precision=PRECISION):
    """Every third probe halves the bracket, whatever the prediction says."""
    return 3 * math.ceil(math.log2((1 - smallest) / precision))


rises = st.lists(st.floats(-1, 1), min_size=20, max_size=20)
predictions = {
    "none": no_prediction,
    "zero": lambda plan: 0.0,
    "negative": lambda plan: -1.0,
    "huge": lambda plan: 1e12,
    "tiny": lambda plan: 1e-12 * (1 - plan.param_ratio),
    "sloped": lambda plan: 1 - plan.param_ratio,
}


@pytest.mark.parametrize("prediction", predictions)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    table=rises,
    completes=st.lists(st.booleans(), min_size=20, max_size=20),
    smallest=st.floats(0.002, 0.9),
    tolerance=st.floats(0, 0.5),
)
def test_only_a_plan_measured_feasible_is_returned(
    prediction, table, completes, smallest, tolerance
):
    """On any function at all, within a bounded number of probes."""
    measure = Measure(
        lambda ratio: table[int(ratio * 19.99)], lambda ratio: completes[int(ratio * 19.99)]
    )
    plan, probes = search(measure, tolerance, predictions[prediction], smallest)
    feasible = [probe for probe in probes if probe.feasible]
    for probe in probes:
        found = measure.at(probe.param_ratio)
        assert probe.feasible == (found.complete and found.mean <= tolerance)
        assert smallest - 1 / 1000 <= probe.param_ratio < 1
    assert plan.param_ratio == (feasible[-1].param_ratio if feasible else 1.0)
    assert plan.param_ratio == min([1.0, *(probe.param_ratio for probe in feasible)])
    assert len(probes) <= bound_on_probes(smallest)


def test_no_probe_is_spent_on_a_bracket_within_the_precision():
    measure = Measure(line)
    plan, probes = search(measure, smallest=0.996)
    assert (plan, probes, measure.ratios) == (plan_at(1.0), [], [])


@pytest.mark.parametrize("border", [0.95, 0.55, 0.05])
def test_no_plan_is_measured_twice_and_the_dense_one_never(border):
    """Where steps of ten per cent are all there is, many ratios give the same ranks."""

    def coarse(ratio):
        return plan_at(math.ceil(ratio * 10 - 1e-9) / 10)

    measure = Measure(lambda ratio: 0.05 + (border - ratio))
    plan, probes = search_tolerance(coarse, no_prediction, measure, 0.05, smallest=0.001)
    assert plan.param_ratio == pytest.approx(math.ceil(border * 10) / 10)
    assert len(probes) == len(measure.ratios) == len(set(measure.ratios))
    assert 1.0 not in measure.ratios


def true_rise(ratio):
    """Falls steeply, like real ones: 0.05 at a share of 0.7."""
    return 0.05 * (1 - ratio) ** 2 / 0.09


def test_the_first_probe_is_where_the_prediction_meets_the_tolerance():
    measure = Measure(true_rise)
    search(measure, predict=lambda plan: true_rise(plan.param_ratio))
    assert measure.ratios[0] == pytest.approx(0.7, abs=2e-3)


def test_the_first_probe_is_a_standard_error_below_the_prediction():
    measure = Measure(line)
    search(measure, predict=lambda plan: line(plan.param_ratio), standard_error=lambda plan: 0.01)
    assert measure.ratios[0] == pytest.approx(0.56, abs=2e-3)  # where line is 0.05 + 0.01
    assert measure.ratios[1] == pytest.approx(0.6, abs=3e-3)  # without it


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
def test_a_biased_prediction_is_corrected_by_what_was_measured(factor):
    measure = Measure(true_rise)
    plan, _ = search(measure, predict=lambda plan: factor * true_rise(plan.param_ratio))
    first = 1 - 0.3 / math.sqrt(factor)
    assert measure.ratios[0] == pytest.approx(first, abs=2e-3)
    # The second is the true border, kept away from the ends of the bracket.
    low, high = (first, 1.0) if factor < 1 else (0.001, first)
    margin = 0.05 * (high - low)
    assert measure.ratios[1] == pytest.approx(min(max(0.7, low + margin), high - margin), abs=3e-3)
    assert 0.7 - 1e-9 <= plan.param_ratio <= 0.7 + PRECISION + 1 / 1000


def test_a_measured_fall_does_not_correct_the_prediction():
    measure = Measure(lambda ratio: -0.1 if ratio > 0.65 else true_rise(ratio))
    search(measure, predict=lambda plan: true_rise(plan.param_ratio), smallest=0.2)
    # The goal stays where it was, so the second probe is one margin below the first.
    assert measure.ratios[1] == pytest.approx(0.7 - 0.05 * 0.5, abs=3e-3)


def test_every_third_probe_is_the_middle():
    measure = Measure(true_rise)
    _, probes = search(measure, predict=lambda plan: 0.5 * true_rise(plan.param_ratio))
    assert len(probes) > 2
    low, high = 0.001, 1.0
    for index, probe in enumerate(probes):
        if index % 3 == 2:
            assert probe.param_ratio == pytest.approx((low + high) / 2, abs=2e-3)
        low, high = (low, probe.param_ratio) if probe.feasible else (probe.param_ratio, high)


def test_a_good_prediction_saves_probes():
    exact = search(Measure(true_rise), predict=lambda plan: true_rise(plan.param_ratio))[1]
    assert len(exact) <= 9


def items_of(totals, counts=None):
    return list(zip(totals, counts or [1] * len(totals), strict=True))


def test_mean_and_standard_error_equal_the_ratio_estimator():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, size=30)
    before = rng.normal(3.0, 0.5, size=30) * counts
    after = before + rng.normal(0.1, 0.3, size=30) * counts
    found = paired_difference(items_of(before, counts.tolist()), items_of(after, counts.tolist()))
    mean = (after - before).sum() / counts.sum()
    residuals = (after - before) - mean * counts
    error = np.sqrt(30 * np.var(residuals, ddof=1)) / counts.sum()
    assert found.mean == pytest.approx(mean)
    assert found.standard_error == pytest.approx(error)
    assert (found.items, found.complete) == (30, True)


def test_standard_error_of_equal_counts_is_that_of_a_mean():
    rng = np.random.default_rng(1)
    differences = rng.normal(size=12)
    counts = [5] * 12
    found = paired_difference(items_of([0.0] * 12, counts), items_of(5 * differences, counts))
    assert found.mean == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / np.sqrt(12))


def test_pairing_takes_out_what_items_have_in_common():
    rng = np.random.default_rng(2)
    before = rng.normal(100, 30, size=20)
    found = paired_difference(items_of(before), items_of(before + 0.5))
    assert found.mean == pytest.approx(0.5)
    assert found.standard_error < 1e-12


def test_a_single_item_has_no_standard_error():
    found = paired_difference([(2.0, 4)], [(3.0, 4)])
    assert (found.mean, found.standard_error, found.items) == (0.25, math.inf, 1)
    assert found.complete


def test_a_clear_rise_stops_early_and_reads_no_further():
    read = []

    def after():
        for index in range(100):
            read.append(index)
            yield (2.0, 1)

    found = paired_difference(items_of([1.0] * 100), after(), stop_above=0.5)
    assert found == LossDifference(1.0, 0.0, 4, False)
    assert read == [0, 1, 2, 3]


@pytest.mark.parametrize("min_items", [2, 7])
def test_the_least_number_of_items_is_read_before_stopping(min_items):
    found = paired_difference(
        items_of([1.0] * 9), items_of([2.0] * 9), stop_above=0.5, min_items=min_items
    )
    assert (found.items, found.complete) == (min_items, False)


@pytest.mark.parametrize("rise", [0.5, 0.4, 0.0, -1.0])
def test_a_rise_within_the_limit_is_measured_to_the_end(rise):
    found = paired_difference(items_of([1.0] * 9), items_of([1.0 + rise] * 9), stop_above=0.5)
    assert (found.items, found.complete) == (9, True)


def test_without_a_limit_all_items_are_read():
    found = paired_difference(items_of([1.0] * 9), items_of([1e9] * 9))
    assert (found.items, found.complete) == (9, True)


@pytest.mark.parametrize(("spread", "items"), [(0.28, 4), (0.30, 6), (0.35, 6), (0.40, 8)])
def test_a_rise_is_clear_at_three_standard_errors(spread, items):
    """Differences 1 + s, 1 - s, ...: for even n the error is s / sqrt(n - 1), and 0.5 the limit."""
    assert 3 * spread / math.sqrt(items - 1) < 0.5
    totals = [1 + spread * (-1) ** index for index in range(40)]
    # After an odd number of items the mean is above 1, but then the spread around it decides too.
    found = paired_difference(items_of([0.0] * 40), items_of(totals), stop_above=0.5)
    assert not found.complete
    assert found.items <= items
    differences = np.array(totals[: found.items])
    error = differences.std(ddof=1) / math.sqrt(found.items)
    assert differences.mean() - 3 * error > 0.5
    assert found.standard_error == pytest.approx(error)
    for fewer in range(4, found.items):
        part = np.array(totals[:fewer])
        assert part.mean() - 3 * part.std(ddof=1) / math.sqrt(fewer) <= 0.5


def test_the_outcome_after_the_last_item_is_complete():
    found = paired_difference(items_of([1.0] * 4), items_of([9.0] * 4), stop_above=0.5)
    assert (found.items, found.complete) == (4, True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["before", "after"])
def test_a_loss_that_is_not_finite_is_an_error(which, bad):
    lists = {"before": items_of([1.0] * 5), "after": items_of([1.0] * 5)}
    lists[which][3] = (bad, 1)
    with pytest.raises(
        NumericalError, match=r"^The loss of item 3 is not finite; load the model in float32"
    ):
        paired_difference(lists["before"], lists["after"])


def test_a_comparison_of_fewer_items_is_never_called_complete():
    with pytest.raises(ValueError, match=r"shorter|fewer|items"):
        paired_difference(items_of([1.0] * 5), items_of([1.0] * 3))


def test_items_without_scored_positions_count_for_nothing():
    """Sequences whose labels are all ignored, first in line."""
    before = [(0.0, 0)] * 5 + items_of([1.0] * 5)
    after = [(0.0, 0)] * 5 + items_of([1.5] * 5)
    found = paired_difference(before, after, stop_above=2.0)
    assert (found.mean, found.items, found.complete) == (0.5, 10, True)

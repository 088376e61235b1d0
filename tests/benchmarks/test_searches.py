"""The rank searches: budgets, that they find what is there to be found, and what they refuse."""

import math
from functools import partial

import pytest
import torch

from benchmarks.searches import bayesian, search
from benchmarks.searches.latency import latency_search, measure_latency
from benchmarks.searches.problem import RankProblem, best_of, layer_groups
from benchmarks.searches.search import SEARCHES
from benchmarks.searches.sensitivity import SHARES
from hf_lowrank.errors import ConfigError, NumericalError
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import predicted_rise
from tests.ranks import dense_cost, random_instance, spectrum_of

search_plan = partial(search.search_plan, trials=24)
SHAPES = {
    f"layers.{block}.{kind}": shape
    for block in range(2)
    for kind, shape in (("q_proj", (16, 16)), ("up_proj", (32, 16)))
}
# What a share of each layer's components is worth: q of the second block by far the most.
WORTH = dict(zip(SHAPES, (1.0, 0.2, 20.0, 0.5), strict=True))
every_search = pytest.mark.parametrize("name", sorted(SEARCHES))


def spectra_of(price=True):
    found = {}
    for name, shape in SHAPES.items():
        sigma = (WORTH[name] * 0.8 ** torch.arange(16)).sqrt()
        found[name] = spectrum_of(
            shape, sigma.tolist(), (sigma**2 / 100).tolist() if price else None
        )
    return found


def true_loss(plan):
    """A loss that adds up over layers, as the prices of `spectra_of` say."""
    errors = RankProblem(SHAPES, spectra_of(), 0.5, trials=1).errors()
    return 3.0 + sum(float(errors[n][r]) for n, r in plan.ranks.items() if r is not None)


class Measure:
    """`true_loss`, counted."""

    def __init__(self):
        self.plans = []

    def __call__(self, plan):
        self.plans.append(plan)
        return true_loss(plan)


def ranks_of(plan):
    return [plan.ranks[name] or min(SHAPES[name]) for name in SHAPES]


@every_search
@pytest.mark.parametrize("ratio", [0.2, 0.55, 0.9])
def test_a_search_never_exceeds_its_budget_and_nearly_spends_it(name, ratio):
    plan = search_plan(name, SHAPES, spectra_of(), ratio, measure=true_loss, trials=6)
    assert plan.param_ratio <= ratio
    step = max(sum(shape) for shape in SHAPES.values()) / plan.dense_parameters
    assert plan.param_ratio > ratio - step


def weights_of(shape, rank, form="factors"):
    """A machine whose seconds are the weights of a layer."""
    return 1e-6 * (shape[0] * shape[1] if rank is None else rank * sum(shape))


@every_search
def test_a_search_does_better_than_equal_shares(name, monkeypatch):
    # The seconds of a busy machine may favour equal shares.
    monkeypatch.setattr("benchmarks.searches.latency.measure_latency", weights_of)
    plan = search_plan(name, SHAPES, spectra_of(), 0.5, measure=true_loss, trials=16)
    uniform = search_plan("uniform", SHAPES, spectra_of(), 0.5)
    best = search_plan("price", SHAPES, spectra_of(), 0.5)
    assert true_loss(best) <= true_loss(plan) < true_loss(uniform)


@pytest.mark.parametrize("name", sorted(set(SEARCHES) - {"latency"}))
def test_a_search_repeats_itself(name):
    plans = [
        search_plan(name, SHAPES, spectra_of(), 0.5, measure=true_loss, trials=6, seed=3)
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", ["bayes-types", "bayes-groups", "cross-entropy"])
def test_measured_searches_return_the_best_that_they_tried(name):
    measure = Measure()
    plan = search_plan(name, SHAPES, spectra_of(), 0.5, measure=measure, trials=9)
    assert len(measure.plans) <= 9
    assert true_loss(plan) == min(true_loss(each) for each in measure.plans)
    assert measure.plans[0] == search_plan("uniform", SHAPES, spectra_of(), 0.5)
    assert all(each.param_ratio <= 0.5 for each in measure.plans)


@every_search
def test_fixed_ranks_and_the_smallest_rank_are_kept(name):
    fixed = {"layers.0.q_proj": 2, "layers.1.up_proj": None}
    plan = search_plan(
        name, SHAPES, spectra_of(), 0.75, measure=true_loss, trials=4, fixed=fixed, min_rank=3
    )
    assert {key: plan.ranks[key] for key in fixed} == fixed
    assert min(rank or 99 for key, rank in plan.ranks.items() if key not in fixed) >= 3


@pytest.mark.parametrize("name", [name for name in sorted(SEARCHES) if SEARCHES[name].measures])
def test_measured_searches_need_something_to_measure(name):
    with pytest.raises(ConfigError, match=rf"^rule '{name}' measures losses; pass held-out bat"):
        search_plan(name, SHAPES, spectra_of(), 0.5)


@every_search
def test_a_budget_below_the_smallest_ranks_is_refused(name):
    with pytest.raises(ConfigError, match=r"^param_ratio 0\.01 allows 15 parameters"):
        search_plan(name, SHAPES, spectra_of(), 0.01, measure=true_loss)


@pytest.mark.parametrize("name", sorted(RULES))
def test_rules_are_reached_by_the_same_call(name):
    assert search_plan(name, SHAPES, spectra_of(), 0.5).param_ratio <= 0.5


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match=r"^rule must be one of uniform, .*; got 'magic'\.$"):
        search_plan("magic", SHAPES, spectra_of(), 0.5)


def test_a_missing_optuna_is_one_sentence(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(bayesian.importlib, "import_module", missing)
    message = r"^Bayesian searches of ranks need optuna: pip install 'hf-lowrank\[search\]'\.$"
    with pytest.raises(ConfigError, match=message):
        search_plan("bayes-types", SHAPES, spectra_of(), 0.5, measure=true_loss)


def test_plans_without_a_finite_loss_lose():
    def measure(plan):
        if (plan.ranks["layers.1.q_proj"] or 99) < 6:
            raise NumericalError("NaN")
        return 1.0

    plan = search_plan("cross-entropy", SHAPES, spectra_of(), 0.6, measure=measure, trials=12)
    assert (plan.ranks["layers.1.q_proj"] or 99) >= 6
    with pytest.raises(NumericalError, match="No plan that the search of ranks tried"):
        best_of([plan], lambda plan: math.inf)


def test_sensitivity_measures_one_layer_at_a_time():
    measure = Measure()
    search_plan("sensitivity", SHAPES, spectra_of(), 0.5, measure=measure)
    cut = [{n: r for n, r in plan.ranks.items() if r is not None} for plan in measure.plans]
    assert all(len(each) == 1 for each in cut)
    expected = {(n, int(s * m * k / (m + k))) for n, (m, k) in SHAPES.items() for s in SHARES}
    assert {next(iter(each.items())) for each in cut} == expected


def test_sensitivity_threshold_by_hand():
    """Two square layers of which one loses ten times as much at every size."""
    shapes = {"a": (20, 20), "b": (20, 20)}
    spectra = {name: spectrum_of(shape, [1.0] * 20) for name, shape in shapes.items()}
    rises = {"a": {2: 0.5, 4: 0.3, 6: 0.2, 8: 0.1}, "b": {2: 5.0, 4: 3.0, 6: 2.0, 8: 1.0}}

    def measure(plan):
        return sum(rises[name][rank] for name, rank in plan.ranks.items() if rank is not None)

    def ranks(ratio):
        return dict(search_plan("sensitivity", shapes, spectra, ratio, measure=measure).ranks)

    assert ranks(0.2) == {"a": 2, "b": 2}  # the smallest size tried, evenly
    assert ranks(0.4) == {"a": 2, "b": 6}
    assert ranks(0.6) == {"a": 2, "b": None}
    assert ranks(0.8) == {"a": 6, "b": None}


def test_the_proxy_search_finds_the_best_of_all_discrete_shares():
    """One layer type in one depth part: few enough combinations to try them all."""
    names = ["q", "k", "v"]
    shapes = dict.fromkeys(names, (12, 12))
    spectra = {
        name: spectrum_of((12, 12), [1.0] * 12, [worth * 0.7**i for i in range(12)])
        for name, worth in zip(names, (1.0, 3.0, 9.0), strict=True)
    }
    problem = RankProblem(shapes, spectra, 0.5, trials=30)
    errors = problem.errors()

    def error(plan):
        return sum(float(errors[n][r]) for n, r in plan.ranks.items() if r is not None)

    levels = bayesian.LEVELS
    everything = [
        problem.plan_for_weights({"q": 2.0**a, "k": 2.0**b, "v": 2.0**c})
        for a in levels
        for b in levels
        for c in levels
    ]
    found = bayesian.bayes_proxy(problem)
    best = min(error(plan) for plan in everything)
    assert error(found) == pytest.approx(best, rel=0.02)


def test_a_step_that_costs_no_time_is_taken_first():
    """Layer a is as fast at rank 8 as at rank 1; layer b slows down with every component."""
    shapes = {"a": (32, 32), "b": (32, 34)}
    spectra = {name: spectrum_of(shape, [1.0] * 32) for name, shape in shapes.items()}

    def latency(shape, rank):
        rank = 16 if rank is None else rank
        return max(rank, 8) if shape == (32, 32) else 2.0 * rank

    plan = latency_search(RankProblem(shapes, spectra, 0.3, trials=1), latency)
    assert plan.ranks["a"] == 8
    assert plan.param_ratio <= 0.3
    assert latency_search(RankProblem(shapes, spectra, 0.9, trials=1), latency).ranks["a"] is None


def test_a_dense_layer_has_no_error():
    """At the break-even rank of 10 half of a's price is left, but a layer of that rank is dense."""
    shapes = {"a": (20, 20), "b": (20, 20)}
    prices = {"a": [0.05] * 20, "b": [0.07] * 10 + [0.0] * 10}
    spectra = {name: spectrum_of((20, 20), [1.0] * 20, prices[name]) for name in shapes}

    def latency(shape, rank):
        return 10.0 if rank is None else float(rank)

    plan = latency_search(RankProblem(shapes, spectra, 0.55, trials=1), latency)
    assert plan.ranks == {"a": None, "b": 1}


@pytest.mark.parametrize("trials", [1, 5, 8])
def test_the_learned_search_spends_its_trials_on_different_plans(trials):
    measure = Measure()
    search_plan("cross-entropy", SHAPES, spectra_of(), 0.5, measure=measure, trials=trials)
    tried = {tuple(plan.ranks.items()) for plan in measure.plans}
    assert len(tried) == len(measure.plans) == trials


def test_latency_is_measured_in_seconds():
    assert 0 < measure_latency((64, 64), None) < 1
    assert 0 < measure_latency((64, 64), 4) < 1


def test_layers_are_grouped_by_type_and_depth():
    names = [f"model.layers.{i}.mlp.{kind}" for i in range(4) for kind in ("up", "down")]
    assert layer_groups(names, 1) == {"up/0": names[::2], "down/0": names[1::2]}
    assert layer_groups(names, 2)["up/1"] == [names[4], names[6]]
    assert len(layer_groups(names, 8)) == 8
    assert layer_groups(["0", "2"], 1) == {"layer/0": ["0", "2"]}


def test_errors_are_shares_of_energy_without_prices():
    errors = RankProblem(
        {"a": (2, 3)}, {"a": spectrum_of((2, 3), [3.0, 4.0])}, 0.5, trials=1
    ).errors()
    assert errors["a"].tolist() == pytest.approx([1.0, 16 / 25, 0.0])


def test_a_plan_is_measured_once():
    measure = Measure()
    problem = RankProblem(SHAPES, spectra_of(), 0.5, measure, trials=1)
    plan = RankPlan(dict.fromkeys(SHAPES), SHAPES)
    assert problem.loss(plan) == problem.loss(plan) == 3.0
    assert len(measure.plans) == 1


@every_search
def test_the_compact_form_is_counted_at_its_own_cost(name):
    shapes, spectra = random_instance(3)
    plan = search_plan(
        name,
        shapes,
        spectra,
        0.7,
        measure=lambda plan: predicted_rise(spectra, plan),
        trials=4,
        form="compact",
    )
    assert plan.form == "compact"
    assert plan.kept_parameters <= 0.7 * dense_cost(shapes)
    assert plan.param_ratio > 0.6

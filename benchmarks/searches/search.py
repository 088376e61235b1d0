"""The rank searches of other systems behind one call. Rules that need no search: rules.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.searches.bayesian import bayes_groups, bayes_proxy, bayes_types
from benchmarks.searches.cross_entropy import cross_entropy_search
from benchmarks.searches.latency import latency_search
from benchmarks.searches.problem import RankProblem
from benchmarks.searches.sensitivity import sensitivity_search
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import Shapes, check_budget, plan_for_budget
from hf_lowrank.value_checks import check_choice


@dataclass(frozen=True)
class Search:
    """A search over ranks.

    Attributes:
        run: From a problem to a plan; its docstring names the source and what was simplified.
        measures: Whether it needs losses measured on held-out data.
    """

    run: Callable[[RankProblem], RankPlan]
    measures: bool


SEARCHES: dict[str, Search] = {
    "sensitivity": Search(sensitivity_search, measures=True),
    "bayes-types": Search(bayes_types, measures=True),
    "bayes-groups": Search(bayes_groups, measures=True),
    "bayes-proxy": Search(bayes_proxy, measures=False),
    "cross-entropy": Search(cross_entropy_search, measures=True),
    "latency": Search(latency_search, measures=False),
}


def search_plan(
    name: str,
    shapes: Shapes,
    spectra: Mapping[str, Spectrum],
    param_ratio: float,
    **options: Any,
) -> RankPlan:
    """Ranks within a budget by any rule or search.

    Args:
        name: A name in `RULES` or `SEARCHES`.
        shapes: (out_features, in_features) of every targeted layer.
        spectra: Spectrum of every layer that is not fixed.
        param_ratio: Kept / dense parameters over these layers, in (0, 1].
        **options: `measure`, `trials`, `seed`, `min_rank`, `fixed` and `form`; see `RankProblem`.

    Returns:
        A plan that keeps at most `param_ratio` of the parameters.

    Raises:
        ConfigError: There is no such rule, the smallest ranks exceed the budget, the search needs
            a `measure` and has none, or optuna is missing.
    """
    problem = RankProblem(shapes, spectra, param_ratio, **options)
    limits: dict[str, Any] = {
        "min_rank": problem.min_rank,
        "fixed": problem.fixed,
        "form": problem.form,
    }
    if name in RULES:
        return plan_for_budget(shapes, spectra, name, param_ratio, **limits)
    check_choice("rule", name, (*RULES, *SEARCHES))
    check_budget(shapes, param_ratio, **limits)
    if SEARCHES[name].measures and problem.measure is None:
        raise ConfigError(f"rule {name!r} measures losses; pass held-out batches.")
    return SEARCHES[name].run(problem)

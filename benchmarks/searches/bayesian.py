"""Searches by Bayesian optimisation, with optuna (the extra `search`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.searches.problem import (
    Measure,
    RankProblem,
    best_of,
    group_weights,
    layer_groups,
)
from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.plan import RankPlan

RANGE = 2.0
LEVELS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
GROUP_DEPTHS = 4


def bayes_types(problem: RankProblem) -> RankPlan:
    """One share for each layer type, optimised on the measured loss.

    Kim et al. 2020 (global rank selection by Bayesian optimisation, IEEE Access 8). Simplified:
    a tree-structured Parzen estimator in place of a Gaussian process, layer types in place of
    single convolutions, and the budget is met by construction in place of a penalty.
    """
    return _bayes_weights(problem, depths=1)


def bayes_groups(problem: RankProblem) -> RankPlan:
    """One share for each layer type and quarter of the depth, optimised on the measured loss.

    Bolaco (Ji et al., EMNLP Findings 2024), whose metric is `pooled`. Simplified: a
    tree-structured Parzen estimator in place of a Gaussian process, and its groups of layers are
    types by quarters of the depth.
    """
    return _bayes_weights(problem, depths=GROUP_DEPTHS)


def bayes_proxy(problem: RankProblem) -> RankPlan:
    """Discrete shares by group, optimised on a cheap proxy; the best few are then measured.

    PARS (Sobolev et al. 2022, Mathematics 10(20)): ranks as a constrained discrete problem.
    Simplified: the proxy is the truncation error in the metric in force, in place of the loss
    after a repair of the feature statistics. It costs no forward pass, so ten times `trials`
    plans are tried; where a measured loss is at hand, it decides among the best three.
    """
    errors = problem.errors()

    def proxy(plan: RankPlan) -> float:
        ranks = {name: plan.ranks[name] for name in errors}
        return sum(float(errors[n][rank]) for n, rank in ranks.items() if rank is not None)

    groups = layer_groups(problem.free, GROUP_DEPTHS)
    tried = _optimise(
        lambda values: problem.plan_for_weights(group_weights(groups, values)),
        proxy,
        lambda trial, name: trial.suggest_categorical(name, LEVELS),
        list(groups),
        10 * problem.trials,
        problem.seed,
    )
    ordered = sorted(tried, key=proxy)
    return ordered[0] if problem.measure is None else best_of(ordered[:3], problem.loss)


def _bayes_weights(problem: RankProblem, depths: int) -> RankPlan:
    groups = layer_groups(problem.free, depths)
    tried = _optimise(
        lambda values: problem.plan_for_weights(group_weights(groups, values)),
        lambda plan: min(problem.loss(plan), 1e30),  # optuna refuses infinity
        lambda trial, name: trial.suggest_float(name, -RANGE, RANGE),
        list(groups),
        problem.trials,
        problem.seed,
    )
    return best_of(tried, problem.loss)


def _optimise(
    plan_at: Callable[[Sequence[float]], RankPlan],
    loss: Measure,
    suggest: Callable[[Any, str], float],
    names: Sequence[str],
    trials: int,
    seed: int,
) -> list[RankPlan]:
    """All plans tried, equal shares first."""
    optuna = require_optuna()
    tried: list[RankPlan] = []

    def objective(trial: Any) -> float:  # noqa: ANN401
        tried.append(plan_at([suggest(trial, name) for name in names]))
        return loss(tried[-1])

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, trials // 3))
        study = optuna.create_study(sampler=sampler)
        study.enqueue_trial(dict.fromkeys(names, 0.0))
        study.optimize(objective, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return list({tuple(plan.ranks.values()): plan for plan in tried}.values())


def require_optuna() -> Any:  # noqa: ANN401
    """The module optuna.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise ConfigError(
            "Bayesian searches of ranks need optuna: pip install 'hf-lowrank[search]'."
        ) from None

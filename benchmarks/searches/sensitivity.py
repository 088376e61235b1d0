"""ASVD's sensitivity search: what each layer costs at a few sizes when it alone is cut."""

from __future__ import annotations

import torch

from benchmarks.rank_within import rank_within
from benchmarks.searches.problem import RankProblem
from hf_lowrank.ranks.plan import RankPlan, useful_rank

SHARES = (0.2, 0.4, 0.6, 0.8)


def sensitivity_search(problem: RankProblem) -> RankPlan:
    """One threshold on measured sensitivities (ASVD: Yuan et al. 2023, section 4.3).

    The components that lead from one grid rank up to the next are worth the loss measured at the
    lower of the two, with all other layers dense; one threshold over these worths, which is the
    bisection of the paper, then chooses every rank. Simplified: mean loss in place of perplexity
    (the same order), four sizes in place of nine, and within a grid step single components, so
    that the budget is met exactly. Takes `layers x 4` measurements whatever `trials` says.
    """
    dense: dict[str, int | None] = dict.fromkeys(problem.shapes)
    scores = {}
    for name in problem.free:
        shape, form = problem.shapes[name], problem.form
        size = min(shape)
        grid = sorted({max(1, rank_within(shape, share, form)) for share in SHARES})
        cuts = [rank for rank in grid if useful_rank(shape, rank, form) is not None]
        worth = torch.empty(size, dtype=torch.float64)
        # Below the smallest rank tried nothing is known: kept before everything else, evenly.
        worth[: cuts[0] if cuts else size] = torch.inf
        for rank, following in zip(cuts, [*cuts[1:], size], strict=False):
            plan = RankPlan(dense | {name: rank}, dict(problem.shapes), form=form)
            worth[rank:following] = problem.loss(plan)
        scores[name] = worth.cummin(0).values
    largest = max(
        (float(s[s.isfinite()].max()) for s in scores.values() if s.isfinite().any()), default=0.0
    )
    for name, worth in scores.items():
        index = torch.arange(1, len(worth) + 1, dtype=torch.float64)
        scores[name] = torch.where(worth.isinf(), largest + 1 - index / len(worth), worth)
    return problem.plan(scores)

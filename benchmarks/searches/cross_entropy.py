"""A learned search: a distribution over ranks that moves towards what was measured to be good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from benchmarks.searches.problem import RankProblem, best_of, group_weights, layer_groups
from hf_lowrank.ranks.plan import RankPlan

ROUNDS = 4
GROUP_DEPTHS = 2


def cross_entropy_search(problem: RankProblem) -> RankPlan:
    """Gaussian log-shares by group of layers, refitted in rounds to the best quarter so far.

    Stands for Cheng et al. 2020 (ranks by reinforcement learning). Simplified: the policy is one
    Gaussian for each layer type and half of the depth and has no state; it is moved by the
    cross-entropy method, which needs no learning rate, in place of a policy gradient; and the
    reward is the loss right after the cut, with no fine-tuning.
    """
    groups = layer_groups(problem.free, GROUP_DEPTHS)
    generator = torch.Generator().manual_seed(problem.seed)
    mean = torch.zeros(len(groups), dtype=torch.float64)
    spread = torch.ones(len(groups), dtype=torch.float64)
    samples = mean[None]  # equal shares come first
    tried = [_plan(problem, groups, mean)]
    while len(tried) < problem.trials:
        size = min(max(1, problem.trials // ROUNDS), problem.trials - len(tried))
        noise = torch.randn(size, len(groups), generator=generator, dtype=torch.float64)
        samples = torch.cat([samples, mean + spread * noise])
        tried += [_plan(problem, groups, row) for row in samples[-size:]]
        losses = torch.tensor([problem.loss(plan) for plan in tried], dtype=torch.float64)
        # Of one sample there is no spread; the smoothing keeps a few from narrowing it at once.
        best = samples[losses.argsort(stable=True)[: max(2, len(tried) // 4)]]
        mean = best.mean(dim=0)
        spread = 0.5 * spread + 0.5 * (best - mean).square().mean(dim=0).sqrt()
    return best_of(tried, problem.loss)


def _plan(
    problem: RankProblem, groups: Mapping[str, Sequence[str]], log2_weights: torch.Tensor
) -> RankPlan:
    return problem.plan_for_weights(group_weights(groups, log2_weights.tolist()))

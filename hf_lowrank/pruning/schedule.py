"""Schedules over a training run: the share of weights kept, and the chance of a sparse matrix."""

from __future__ import annotations


def density_at(
    step: int, total_steps: int, final_density: float, warmup: float, cooldown: float
) -> float:
    """Share of the weights that survive after a step: `v_f + (1 - v_f) (1 - progress)^3`.

    The cubic schedule of Zhu and Gupta (2017), as in movement pruning (Sanh et al., NeurIPS 2020).

    Args:
        step: Optimizer steps done.
        total_steps: Optimizer steps of the run.
        final_density: v_f, reached at the beginning of the cool-down.
        warmup: Share of the steps at the start without pruning.
        cooldown: Share of the steps at the end at `final_density`.
    """
    start, end = warmup * total_steps, (1 - cooldown) * total_steps
    progress = min(1.0, max(0.0, (step - start) / (end - start)))
    return final_density + (1 - final_density) * (1 - progress) ** 3


def sparse_probability(step: int, total_steps: int, start: float, share: float) -> float:
    """Chance that a layer uses its sparse matrix: falls linearly from `start` to 0.

    Args:
        step: Optimizer steps done.
        total_steps: Optimizer steps of the run.
        start: Probability at the first step.
        share: Share of the steps after which it is 0.
    """
    return start * max(0.0, 1 - step / (share * total_steps))

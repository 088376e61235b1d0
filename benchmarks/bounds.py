"""The IJCAI 2025 bounds on the output error of truncated networks, against what is measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.theorems import output_error_bound
from hf_lowrank.config import option
from hf_lowrank.report.provenance import write_result
from hf_lowrank.value_checks import check_between, check_count

DELTAS = (0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass
class BoundsArguments:
    """Arguments of the check of Theorem 1 on random bias-free ReLU networks."""

    networks: int = option(100, "Random networks for each delta.")
    depth: int = option(4, "Layers of a network.")
    width: int = option(64, "Inputs, and outputs of every layer.")
    inputs: int = option(64, "Random inputs of each network.")
    deltas: list[float] | None = option(
        None,
        "Thresholds: components with sigma_i / sigma_1 below delta are dropped. Default: "
        + " ".join(map(str, DELTAS))
        + ".",
    )
    seed: int = option(0, "Seed of weights and inputs.")
    output: str = option("outputs/bounds.json", "JSON file of the result.")

    def check(self) -> None:
        """Refuses what leaves nothing to measure.

        Raises:
            ConfigError: A count is below 1, or a delta outside (0, 1).
        """
        for name in ("networks", "depth", "width", "inputs"):
            check_count(name, getattr(self, name))
        for delta in self.deltas or DELTAS:
            check_between("deltas", delta, "(0, 1)")


def check_bounds(args: BoundsArguments) -> None:
    """Writes, for each delta, how often the bound is broken and how far above the error it is."""
    args.check()
    rows = [measure_bound(args, delta) for delta in args.deltas or DELTAS]
    for row in rows:
        print(
            f"delta {row['delta']:g}: kept {row['kept_components']:.2f}, {row['violations']} of "
            f"{row['cases']} broken, bound / error {row['median_ratio'] or float('nan'):.3g} "
            "in the median"
        )
    write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


def measure_bound(args: BoundsArguments, delta: float) -> dict[str, Any]:
    """Theorem 1 at one threshold, over all networks and inputs.

    Returns:
        `delta`; `kept_components`, mean share; `cases`, pairs of network and input; `violations`,
        cases whose error exceeds the bound by more than rounding; `median_ratio` and
        `smallest_ratio` of bound / error over the cases with an error, None without one.
    """
    generator = torch.Generator().manual_seed(args.seed)
    kept, cases, violations = 0, 0, 0
    ratios: list[float] = []
    for _ in range(args.networks):
        weights, inputs = _random_network(args, generator)
        cut, largest, dropped, ranks = _cut(weights, delta)
        kept += sum(ranks)
        errors = (_forward(weights, inputs) - _forward(cut, inputs)).norm(dim=0)
        for error, norm in zip(errors.tolist(), inputs.norm(dim=0).tolist(), strict=True):
            bound = output_error_bound(largest, dropped, norm)
            cases += 1
            violations += error > bound * (1 + 1e-9) + 1e-12
            if error > 1e-12:
                ratios.append(bound / error)
    return {
        "delta": delta,
        "kept_components": kept / (args.networks * args.depth * args.width),
        "cases": cases,
        "violations": violations,
        "median_ratio": statistics.median(ratios) if ratios else None,
        "smallest_ratio": min(ratios) if ratios else None,
    }


def _random_network(
    args: BoundsArguments, generator: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gaussian weights that keep a vector's size on average, and inputs, shape (width, inputs)."""
    shape = args.depth, args.width, args.width
    weights = torch.randn(shape, generator=generator, dtype=torch.float64) / args.width**0.5
    inputs = torch.randn(args.width, args.inputs, generator=generator, dtype=torch.float64)
    return list(weights), inputs


def _cut(
    weights: Sequence[torch.Tensor], delta: float
) -> tuple[list[torch.Tensor], list[float], list[float], list[int]]:
    """Truncated weights; sigma_1 and the largest dropped singular value of each; the ranks."""
    cut, largest, dropped, ranks = [], [], [], []
    for weight in weights:
        U, s, Vh = torch.linalg.svd(weight)
        rank = int((s >= delta * s[0]).sum())
        cut.append((U[:, :rank] * s[:rank]) @ Vh[:rank])
        largest.append(float(s[0]))
        dropped.append(float(s[rank]) if rank < len(s) else 0.0)
        ranks.append(rank)
    return cut, largest, dropped, ranks


def _forward(weights: Sequence[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    for weight in weights[:-1]:
        inputs = torch.relu(weight @ inputs)
    return weights[-1] @ inputs

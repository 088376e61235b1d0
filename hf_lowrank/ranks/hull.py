"""The lower convex hull of (cost, error): the steps that pay, best first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Point = tuple[float, float, int | None]


def tail_sums(values: torch.Tensor) -> torch.Tensor:
    """Sum of the values from each index on, and 0 at the end: what a cut at each rank drops."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Corners of the lower convex hull of (cost, error, rank) points, costs rising."""
    hull: list[Point] = []
    for point in points:
        while len(hull) >= 2 and slope(hull[-2], point) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def slope(before: Point, after: Point) -> float:
    """Change of the error for each unit of cost; negative is good."""
    return (after[1] - before[1]) / (after[0] - before[0])

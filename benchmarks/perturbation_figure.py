"""Measured and predicted change of the loss along weight noise, as one picture without colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import panels_of, save_figure
from hf_lowrank.errors import ConfigError

_DECADES = 3  # of the log part of the axis below the largest value
_STEPS = 90  # of a drawn curve


def range_title(row: Mapping[str, Any]) -> str:
    """Names a row: `param_ratio 0.8, held-out set`."""
    return f"param_ratio {row['param_ratio']:g}, {row['set'].replace('_', '-')} set"


def draw_ranges(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Change of the loss by relative weight noise as an SVG file, a panel for each row.

    Measured as points with bars of one standard error, the first order dashed, the second order
    solid; a dotted line where the first order no longer holds. The loss axis is that of all panels,
    linear around zero and logarithmic beyond.

    Args:
        rows: Rows of `measure_ranges`.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or there is no row.
    """
    if not rows:
        raise ConfigError("There is no range to draw; measure one first.")
    figure, panels = panels_of(len(rows), (4.6, 3.6), columns=2)
    for axes, row in zip(panels, rows, strict=True):
        if axes is not panels[0]:
            axes.sharey(panels[0])
        _draw(axes, row)
        axes.set_title(range_title(row), loc="left", fontsize=9, pad=14)
        axes.set_xlabel("relative weight noise (log scale)", fontsize=8)
    threshold = linear_threshold(rows)
    panels[0].set_yscale("symlog", linthresh=threshold)
    for axes in panels:
        axes.minorticks_off()
    label = f"change of the loss (nats, log scale, linear within {threshold:g})"
    panels[0].set_ylabel(label, fontsize=8)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=len(labels)
    )
    save_figure(figure, path)


def linear_threshold(rows: Sequence[Mapping[str, Any]]) -> float:
    """Where the loss axis turns from linear to logarithmic, a power of ten, nats.

    Not above the smallest first-order prediction, whose size falls steadily with the noise, unless
    that is more than three decades below the largest value.
    """
    points = [point for row in rows for point in row["points"]]
    largest = max(abs(p[k]) for p in points for k in ("measured", "first_order", "second_order"))
    smallest = min(abs(point["first_order"]) for point in points)
    threshold = max(smallest, largest / 10**_DECADES)
    return 10.0 ** math.floor(math.log10(threshold)) if threshold > 0 else 1.0


def _draw(axes: Any, row: Mapping[str, Any]) -> None:  # noqa: ANN401
    points = row["points"]
    axes.set_xscale("log")
    axes.axhline(0, color="0.5", linewidth=0.5)
    noises = [point["noise"] for point in points]
    axes.errorbar(
        noises,
        [point["measured"] for point in points],
        # A single item has no standard error.
        [e if math.isfinite(e := point["standard_error"]) else 0.0 for point in points],
        fmt="o",
        color="0",
        markersize=4,
        linewidth=0.8,
        capsize=2.5,
        zorder=3,
        label="measured, ± 1 standard error",
    )
    along, first, second = _curves(points)
    axes.plot(along, first, color="0.35", linestyle="--", linewidth=1.2, label="first order")
    axes.plot(along, second, color="0.35", linestyle="-", linewidth=1.2, label="second order")
    _mark_range(axes, row["linear_range"])
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _curves(
    points: Sequence[Mapping[str, float]],
) -> tuple[list[float], list[float], list[float]]:
    """Noise, first and second order between the outermost points, evenly on the log axis."""
    low, high = points[0], points[-1]
    span = low["scale"] / high["scale"]
    shares = [span ** (1 - i / _STEPS) for i in range(_STEPS + 1)]  # of the largest scale
    bend = high["second_order"] - high["first_order"]
    first = [share * high["first_order"] for share in shares]
    second = [f + share**2 * bend for f, share in zip(first, shares, strict=True)]
    return [share * high["noise"] for share in shares], first, second


def _mark_range(axes: Any, reached: float) -> None:  # noqa: ANN401
    """A line where the first order no longer holds; its label is above the panel."""
    if reached > 0:
        axes.axvline(reached, color="0", linestyle=":", linewidth=0.8)
        axes.text(
            reached,
            1.01,
            f"first order holds to {reached:.2g}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=7,
        )
    else:
        axes.text(0, 1.01, "first order holds at no point", transform=axes.transAxes, fontsize=7)

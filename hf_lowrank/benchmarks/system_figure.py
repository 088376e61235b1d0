"""Size against quality of all systems as one picture that needs no colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.benchmarks.catalogue import OWN
from hf_lowrank.benchmarks.figures import panels_of, save_figure
from hf_lowrank.benchmarks.system_rows import all_texts
from hf_lowrank.errors import ConfigError

# Of two systems that share a dash, the markers differ; of a rank rule on two metrics, the dashes.
_DASHES = {"plain": "-", "kfac": "--"}
_OTHER_DASH = ":"
_MARKERS = "osv^D<>phX*d"
_LINE_INCHES = 0.125
_BEYOND_NOTE = "at an edge: no rise (below), overflow (above)"

Point = tuple[float, float]


def draw_systems(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rise of the loss by kept share as an SVG file: a panel for each text, a line for each system.

    This library's systems are thick and black, all others thin and grey: solid in the plain metric,
    dashed in `kfac`, dotted in others. Every line has its name at the right edge, in the order of
    the lines there. A rise that is not positive is drawn on the lower edge of the log scale, one
    that overflowed on the upper edge; failed rows are named below the panel.

    Args:
        rows: Rows of `compare_systems`.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or no row was measured.
    """
    texts = all_texts(rows)
    if not texts:
        raise ConfigError("There is no measured row to draw.")
    names = {row["name"] for row in rows}
    height = max(3.2, 1.1 + _LINE_INCHES * len(names))
    figure, panels = panels_of(len(texts), (6.4, height))
    styles = _styles(rows)
    for axes, text in zip(panels, texts, strict=True):
        _draw(axes, text, rows, styles)
    save_figure(figure, path)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1], near the wanted ones, at least a gap apart (less if there is no room).

    The least squares answer: less `i * gap`, positions must not fall, so neighbours that would
    overlap are pooled at their mean.

    Args:
        wanted: Ascending.
        gap: Smallest distance.
    """
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    pools: list[tuple[float, int]] = []  # mean, members
    for i, place in enumerate(wanted):
        mean, count = place - i * gap, 1
        while pools and pools[-1][0] > mean:
            other, members = pools.pop()
            mean = (mean * count + other * members) / (count + members)
            count += members
        pools.append((mean, count))
    room = 1 - gap * (len(wanted) - 1)
    free = [min(max(0.0, mean), room) for mean, count in pools for _ in range(count)]
    return [place + i * gap for i, place in enumerate(free)]


def _styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Line style by system; markers go round among the systems of one dash."""
    styles: dict[str, dict[str, Any]] = {}
    used: dict[str, int] = {}
    for row in rows:
        if row["name"] not in styles:
            dash = "-" if (own := row["source"] == OWN) else _DASHES.get(row["metric"], _OTHER_DASH)
            group = "own" if own else dash
            marker = _MARKERS[used.get(group, 0) % len(_MARKERS)]
            used[group] = used.get(group, 0) + 1
            styles[row["name"]] = {
                "linestyle": dash,
                "marker": marker,
                "color": "0" if own else "0.5",
                "linewidth": 2.0 if own else 0.7,
                "markersize": 5.5 if own else 3.5,
                "markerfacecolor": "0" if own else "white",
                "zorder": 4 if own else 2,
            }
    return styles


def _draw(
    axes: Any,  # noqa: ANN401
    text: str,
    rows: Sequence[Mapping[str, Any]],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    measured = [row for row in rows if text in row]
    low, high = _limits([row[text]["loss_difference"] for row in measured])
    lines: dict[str, list[Point]] = {}
    beyond = False
    for row in measured:
        rise = _number(row[text]["loss_difference"])
        inside = min(max(rise, low), high)
        beyond |= inside != rise
        share = row["kept_parameters"] / row["dense_parameters"]
        lines.setdefault(row["name"], []).append((share, inside))
    shares = [share for points in lines.values() for share, _ in points]
    margin = 0.06 * (max(shares) - min(shares)) or 0.02
    left, right = min(shares) - margin, max(shares) + margin
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    ends = {}
    for name, points in lines.items():
        points.sort()
        axes.plot(*zip(*points, strict=True), clip_on=False, **styles[name])
        share, rise = points[-1]
        height = math.log(rise / low) / math.log(high / low)
        ends[name] = ((share - left) / (right - left), height)
    _label(axes, ends, styles)
    _ticks(axes)
    axes.set_title(text, loc="left", fontsize=10)
    axes.set_xlabel(_caption(rows, text, beyond), fontsize=8)
    axes.set_ylabel("rise of the loss over dense (nats, log scale)", fontsize=8)


def _label(
    axes: Any,  # noqa: ANN401
    ends: Mapping[str, Point],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    """Names at the right edge, each joined to its line's end by a line that ends in its marker."""
    names = sorted(ends, key=lambda name: ends[name][1])
    inches = axes.figure.get_size_inches()[1] - 1.1
    places = spread([ends[name][1] for name in names], _LINE_INCHES / inches)
    for name, place in zip(names, places, strict=True):
        style, (across, height) = styles[name], ends[name]
        common = {"transform": axes.transAxes, "clip_on": False, "color": style["color"]}
        axes.plot([across, 1.08, 1.1], [height, place, place], linewidth=0.4, **common)
        sample = {**style, "linewidth": min(1.4, style["linewidth"])}
        axes.plot([1.1, 1.14, 1.18], [place] * 3, markevery=[1], **{**sample, **common})
        is_own = style["zorder"] > 2
        axes.text(
            1.2,
            place,
            name,
            transform=axes.transAxes,
            va="center",
            fontsize=7.5 if is_own else 7,
            fontweight="bold" if is_own else "normal",
            color="0" if is_own else "0.25",
        )


def _ticks(axes: Any) -> None:  # noqa: ANN401
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _caption(rows: Sequence[Mapping[str, Any]], text: str, beyond: bool) -> str:
    """The axis' name, and below it what the panel does not show as it is."""
    lines = ["kept share of the parameters"]
    if beyond:
        lines.append(_BEYOND_NOTE)
    failed = [f"{row['name']} {row['param_ratio']:g}" for row in rows if text not in row]
    for start in range(0, len(failed), 4):
        head = "not measured: " if start == 0 else ""
        lines.append(head + ", ".join(failed[start : start + 4]))
    return "\n".join(lines)


def _number(rise: float | None) -> float:
    """Infinity in place of what JSON could not hold."""
    return math.inf if rise is None or math.isnan(rise) else rise


def _limits(rises: Sequence[float | None]) -> tuple[float, float]:
    """Of the log scale, with room for markers on its edges."""
    drawn = [rise for each in rises if 0 < (rise := _number(each)) < math.inf]
    if not drawn:
        return 1e-3, 1.0
    return min(drawn) / 1.25, max(drawn) * 1.25

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
_MARKERS = "os^Dv<>*X+"
_LINE_INCHES = 0.125
_FRAME_INCHES = 1.1  # title, ticks and the first line of the caption
_CARET_UP, _CARET_DOWN = 10, 11  # matplotlib's numbers of markers that stand on a point
_AXIS = "kept share of the parameters"
_LEGEND = "thin lines: solid plain metric, dashed kfac, dotted others"
_BEYOND = "arrows: no rise (down), overflow (up)"

Point = tuple[float, float]


def draw_systems(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rise of the loss by kept share as an SVG file: a panel for each text, a line for each system.

    This library's systems are thick and black, all others thin and grey: solid in the plain metric,
    dashed in `kfac`, dotted in others. Every line has its name at the right edge, in the order of
    the lines there. A rise that is not positive is drawn on the lower edge of the log scale with an
    arrow, one that overflowed on the upper edge; failed rows are named below the panel.

    Args:
        rows: Rows of `compare_systems`.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or no row was measured.
    """
    texts = all_texts(rows)
    if not texts:
        raise ConfigError("There is no measured row to draw.")
    captions = {text: _caption(rows, text) for text in texts}
    extra = max(caption.count("\n") for caption in captions.values())
    names = _LINE_INCHES * max(16, len({row["name"] for row in rows}))
    height = _FRAME_INCHES + names + _LINE_INCHES * extra
    figure, panels = panels_of(len(texts), (6.6, height))
    styles = _styles(rows)
    for axes, text in zip(panels, texts, strict=True):
        ends = _draw_lines(axes, text, rows, styles)
        _label(axes, ends, styles, _LINE_INCHES / names)
        _ticks(axes)
        axes.set_title(text, loc="left", fontsize=10, pad=10)
        axes.set_xlabel(captions[text], fontsize=8)
        axes.set_ylabel("rise of the loss over dense (nats, log scale)", fontsize=8)
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


def _draw_lines(
    axes: Any,  # noqa: ANN401
    text: str,
    rows: Sequence[Mapping[str, Any]],
    styles: Mapping[str, Mapping[str, Any]],
) -> dict[str, Point]:
    """Draws the lines; returns where each ends on the right, in shares of the panel."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        if text in row:
            share = row["kept_parameters"] / row["dense_parameters"]
            lines.setdefault(row["name"], []).append((share, _rise(row, text)))
    shares = [share for points in lines.values() for share, _ in points]
    low, high = _limits([rise for points in lines.values() for _, rise in points])
    margin = 0.06 * (max(shares) - min(shares)) or 0.02
    left, right = min(shares) - margin, max(shares) + margin
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    ends = {}
    for name, points in lines.items():
        drawn = [(share, min(max(rise, low), high)) for share, rise in sorted(points)]
        axes.plot(*zip(*drawn, strict=True), clip_on=False, **styles[name])
        for (share, rise), (_, inside) in zip(sorted(points), drawn, strict=True):
            if rise != inside:
                caret = _CARET_UP if rise > inside else _CARET_DOWN
                axes.plot([share], [inside], marker=caret, markersize=8, color="0", clip_on=False)
        share, inside = drawn[-1]
        height = math.log(inside / low) / math.log(high / low)
        ends[name] = ((share - left) / (right - left), height)
    return ends


def _label(
    axes: Any,  # noqa: ANN401
    ends: Mapping[str, Point],
    styles: Mapping[str, Mapping[str, Any]],
    gap: float,
) -> None:
    """Names at the right edge, each joined to its line's end by a line that ends in its marker."""
    names = sorted(ends, key=lambda name: ends[name][1])
    places = spread([ends[name][1] for name in names], gap)
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


def _caption(rows: Sequence[Mapping[str, Any]], text: str) -> str:
    """The axis' name, and below it what the lines mean and what the panel lacks."""
    rises = [_rise(row, text) for row in rows if text in row]
    low, high = _limits(rises)
    lines = [_AXIS, _LEGEND]
    if any(not low <= rise <= high for rise in rises):
        lines.append(_BEYOND)
    failed = [f"{row['name']} {row['param_ratio']:g}" for row in rows if text not in row]
    for start in range(0, len(failed), 4):
        head = "not measured: " if start == 0 else ""
        lines.append(head + ", ".join(failed[start : start + 4]))
    return "\n".join(lines)


def _rise(row: Mapping[str, Any], text: str) -> float:
    """Rise of the loss; infinity in place of what JSON could not hold."""
    rise: float | None = row[text]["loss_difference"]
    return math.inf if rise is None or math.isnan(rise) else rise


def _limits(rises: Sequence[float]) -> tuple[float, float]:
    """Of the log scale, with room for markers on its edges."""
    drawn = [rise for rise in rises if 0 < rise < math.inf]
    if not drawn:
        return 1e-3, 1.0
    return min(drawn) / 1.25, max(drawn) * 1.25

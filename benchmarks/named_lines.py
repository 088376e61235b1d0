"""Lines that are told apart without colour, each with its name at the right edge of its panel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_MARKERS = "os^Dv<>*X+"
LINE_INCHES = 0.125  # height of a name
CARET_UP, CARET_DOWN = 10, 11  # matplotlib's numbers of markers that stand on a point

Point = tuple[float, float]


def line_styles(
    kinds: Mapping[str, tuple[str, bool]], *, markers_by_kind: bool = True
) -> dict[str, dict[str, Any]]:
    """Settings of each line for matplotlib.

    Args:
        kinds: Dash of each line by its name, and whether it stands out: thick and black, else thin
            and grey.
        markers_by_kind: Markers go round among the lines of one kind; else among all.
    """
    styles: dict[str, dict[str, Any]] = {}
    used: Counter[object] = Counter()
    for name, kind in kinds.items():
        dash, stands_out = kind
        group = kind if markers_by_kind else None
        marker = _MARKERS[used[group] % len(_MARKERS)]
        used[group] += 1
        styles[name] = {
            "linestyle": dash,
            "marker": marker,
            "color": "0" if stands_out else "0.5",
            "linewidth": 2.0 if stands_out else 0.7,
            "markersize": 5.5 if stands_out else 3.5,
            "markerfacecolor": "0" if stands_out else "white",
            "zorder": 4 if stands_out else 2,
        }
    return styles


def name_lines(
    axes: Any,  # noqa: ANN401
    ends: Mapping[str, Point],
    styles: Mapping[str, Mapping[str, Any]],
    gap: float,
) -> None:
    """Names at the right edge, each joined to its line's end by a line that ends in its marker.

    Args:
        axes: The panel.
        ends: Where each line ends on the right, in shares of the panel.
        styles: Of `line_styles`.
        gap: Smallest distance of two names, in shares of the panel's height.
    """
    names = sorted(ends, key=lambda name: ends[name][1])
    places = spread([ends[name][1] for name in names], gap)
    for name, place in zip(names, places, strict=True):
        style, (across, height) = styles[name], ends[name]
        common = {"transform": axes.transAxes, "clip_on": False, "color": style["color"]}
        axes.plot([across, 1.08, 1.1], [height, place, place], linewidth=0.4, **common)
        sample = {**style, "linewidth": min(1.4, style["linewidth"])}
        axes.plot([1.1, 1.14, 1.18], [place] * 3, markevery=[1], **{**sample, **common})
        stands_out = style["zorder"] > 2
        axes.text(
            1.2,
            place,
            name,
            transform=axes.transAxes,
            va="center",
            fontsize=7.5 if stands_out else 7,
            fontweight="bold" if stands_out else "normal",
            color="0" if stands_out else "0.25",
        )


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


def plain_frame(axes: Any) -> None:  # noqa: ANN401
    """A pale grid, small numbers, no lines above and on the right."""
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def log_ticks(axes: Any) -> None:  # noqa: ANN401
    """Plain numbers at 1, 2 and 5 on a log scale of errors, in a plain frame."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    plain_frame(axes)

"""Size against quality of all systems as one picture that needs no colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.catalogue import OWN
from benchmarks.figures import panels_of, save_figure
from benchmarks.named_lines import (
    CARET_DOWN,
    CARET_UP,
    LINE_INCHES,
    Point,
    line_styles,
    log_ticks,
    name_lines,
)
from benchmarks.system_rows import all_texts
from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.plan import COMPACT

# Of two systems that share a dash, the markers differ; of a rank rule on two metrics, the dashes.
_DASHES = {"plain": "-", "kfac": "--"}
_OTHER_DASH = ":"
_FRAME_INCHES = 1.1  # title, ticks and the first line of the caption
_AXIS = "kept share of the parameters"
_LEGEND = "thin lines: solid plain metric, dashed kfac, dotted others"
_BEYOND = "arrows: no rise (down), overflow (up)"


def draw_systems(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rise of the loss by kept share as an SVG file: a panel for each text, a line for each system.

    This library's systems are thick and black, all others thin and grey: solid in the plain metric,
    dashed in `kfac`, dotted in others. Every line has its name at the right edge, in the order of
    the lines there. A rise that is not positive is drawn on the lower edge of the log scale with an
    arrow, one that overflowed on the upper edge; failed rows are named below the panel. Rows that
    repeat a system with compact factors are left to the tables.

    Args:
        rows: Rows of `compare_systems`.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or no row was measured.
    """
    rows = [row for row in rows if row.get("form") != COMPACT]
    texts = all_texts(rows)
    if not texts:
        raise ConfigError("There is no measured row to draw; run the rows first.")
    captions = {text: _caption(rows, text) for text in texts}
    extra = max(caption.count("\n") for caption in captions.values())
    names = LINE_INCHES * max(16, len({row["name"] for row in rows}))
    height = _FRAME_INCHES + names + LINE_INCHES * extra
    figure, panels = panels_of(len(texts), (6.6, height))
    styles = _styles(rows)
    for axes, text in zip(panels, texts, strict=True):
        ends = _draw_lines(axes, text, rows, styles)
        name_lines(axes, ends, styles, LINE_INCHES / names)
        log_ticks(axes)
        axes.set_title(text, loc="left", fontsize=10, pad=10)
        axes.set_xlabel(captions[text], fontsize=8)
        axes.set_ylabel("rise of the loss over dense (nats, log scale)", fontsize=8)
    save_figure(figure, path)


def _styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Line style by system."""
    kinds = {}
    for row in rows:
        own = row["source"] == OWN
        kinds[row["name"]] = ("-" if own else _DASHES.get(row["metric"], _OTHER_DASH), own)
    return line_styles(kinds)


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
                caret = CARET_UP if rise > inside else CARET_DOWN
                axes.plot([share], [inside], marker=caret, markersize=8, color="0", clip_on=False)
        share, inside = drawn[-1]
        height = math.log(inside / low) / math.log(high / low)
        ends[name] = ((share - left) / (right - left), height)
    return ends


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

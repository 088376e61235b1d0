"""Size against score of a table's rows, a panel for each task, as one picture without colour."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import panels_of, save_figure
from benchmarks.named_lines import (
    CARET_DOWN,
    LINE_INCHES,
    Point,
    line_styles,
    name_lines,
    plain_frame,
)
from hf_lowrank.errors import ConfigError
from hf_lowrank.tasks.task_arguments import (
    CUTS,
    CUTTLEFISH_VARIANTS,
    JOINT,
    LPAF_VARIANTS,
    METHOD_NAMES,
    SELECTION_RULES,
)

_CUT, _SELECTED, _PRUNED = "-", "--", ":"
_DENSE = {"linestyle": "-", "color": "0", "linewidth": 0.8, "marker": "", "zorder": 1.5}
_FAR = 12  # points below the dense score, from where on a score is only said to be lower
_LEGEND = (
    "solid: cut, then trained; dashed: cut while training; dotted: pruned first; "
    "thick: with this library's prices\n"
    "mean over the seeds, bars: one standard deviation; points of one size stand side by side; "
    f"arrows: more than {_FAR} points below dense"
)
_NAMES_INCHES = 3.2  # smallest height of a panel
_FRAME_INCHES = 1.2  # title, ticks, names of the axes
_STEP = 0.008  # between neighbours of one size, share of the axis
_MARGIN = 0.06  # on both sides and below and above, share of the axis


def draw_sizes(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Main score after the run, percent, by kept share (log scale) as an SVG file.

    A panel for each task of which there are several sizes, and a line for each method through the
    means over the seeds, with bars of one standard deviation where there are several; the mean
    score of the dense models that the rows started from is a thin line across. Means far below it
    are drawn on the lower edge with an arrow, so that the others can be told apart. The kept share
    is that of the encoder's targeted parameters: `param_ratio` where a row was asked for one, else
    the measured share.

    Args:
        rows: Rows of the table; those of method "dense" only help to place the dense line.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or no task has rows of two sizes.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    by_task = {n: found for n, found in by_task.items() if len({s for _, s in _scores(found)}) > 1}
    if not by_task:
        raise ConfigError("There is no task with rows of two sizes to draw; run more sizes.")
    present = {row["method"] for found in by_task.values() for row in found} - {"dense"}
    methods = [name for name in METHOD_NAMES if name in present]
    kinds = {name: (_dash(name), _is_own(name)) for name in methods}
    styles = line_styles(kinds, markers_by_kind=False)
    styles["dense"] = dict(_DENSE)
    height = max(_NAMES_INCHES, LINE_INCHES * (len(methods) + 5))
    figure, panels = panels_of(len(by_task), (4.4, height + _FRAME_INCHES))
    # Names stand at shares of the panel's width, which the layout finds only nearly.
    figure.get_layout_engine().set(w_pad=0.1)
    for axes, (task, of_task) in zip(panels, by_task.items(), strict=True):
        ends = _draw_lines(axes, of_task, methods, styles)
        name_lines(axes, ends, styles, LINE_INCHES / height)
        plain_frame(axes)
        metric = next(iter(of_task[0]["metrics"])).replace("_", " ")
        axes.set_title(task, loc="left", fontsize=10, pad=10)
        axes.set_ylabel(f"{metric}, percent", fontsize=8)
        axes.set_xlabel("kept share of the targeted parameters (log scale)", fontsize=8)
    figure.supxlabel(_LEGEND, fontsize=7.5, color="0.25")
    save_figure(figure, path)


def _dash(method: str) -> str:
    if method in {*SELECTION_RULES, *CUTTLEFISH_VARIANTS}:
        return _SELECTED
    return _PRUNED if method in LPAF_VARIANTS else _CUT


def _is_own(method: str) -> bool:
    """Whether prices, which are this library's, choose a method's ranks."""
    metric = {**CUTS, **LPAF_VARIANTS}.get(method, {}).get("metric")
    return method == JOINT or metric == "kfac" or SELECTION_RULES.get(method) == "price"


def _draw_lines(
    axes: Any,  # noqa: ANN401
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    styles: Mapping[str, Mapping[str, Any]],
) -> dict[str, Point]:
    """Draws one task; returns where each line ends on the right, in shares of the panel."""
    found, dense = _scores(rows), _dense_score(rows)
    sizes = sorted({size for _, size in found})
    floor = -math.inf if dense is None else dense - _FAR
    span = _scale(axes, sizes)
    ends = {}
    for place, name in enumerate(methods):
        shift = math.exp(_STEP * span * (place - (len(methods) - 1) / 2))
        points = [(x * shift, *found[name, x]) for x in sizes if (name, x) in found]
        if points:
            ends[name] = _draw_line(axes, points, floor, styles[name])
    if dense is not None:
        axes.axhline(dense, **styles["dense"])
        ends["dense"] = (axes.get_xlim()[1], dense)
    axes.margins(y=_MARGIN)
    axes.autoscale_view(scalex=False)
    if any(mean < floor for mean, _ in found.values()):
        axes.set_ylim(bottom=floor)
    to_panel = axes.transData + axes.transAxes.inverted()
    return {name: tuple(to_panel.transform(end)) for name, end in ends.items()}


def _draw_line(
    axes: Any,  # noqa: ANN401
    points: Sequence[tuple[float, float, float]],
    floor: float,
    style: Mapping[str, Any],
) -> Point:
    """A line through means, bars for deviations, arrows on the floor; returns its right end."""
    means = [max(floor, mean) for _, mean, _ in points]
    axes.plot([x for x, _, _ in points], means, clip_on=False, **style)
    for x, mean, deviation in points:
        if mean < floor:
            axes.plot([x], [floor], marker=CARET_DOWN, markersize=5, color="0.3", clip_on=False)
        elif deviation > 0:
            thin = {"elinewidth": 0.6, "capsize": 1.5, "capthick": 0.6, "zorder": style["zorder"]}
            axes.errorbar(x, mean, deviation, fmt="none", ecolor=style["color"], **thin)
    return points[-1][0], means[-1]


def _scale(axes: Any, sizes: Sequence[float]) -> float:  # noqa: ANN401
    """A log scale with a tick at each size; returns the log of the largest over the smallest."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    span = math.log(sizes[-1] / sizes[0]) or 1.0
    room = math.exp(_MARGIN * span)
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] / room, sizes[-1] * room)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    return span


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float], tuple[float, float]]:
    """Mean and standard deviation over the seeds of the score, percent, by method and size."""
    groups: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["method"] != "dense":
            size = row["param_ratio"]
            if size is None:
                size = row["parameters"]["targeted_kept"] / row["parameters"]["targeted_dense"]
            groups.setdefault((row["method"], size), []).append(_percent(row["metrics"]))
    return {
        key: (statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0)
        for key, scores in groups.items()
    }


def _dense_score(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over the seeds, percent; None where no row says it."""
    by_seed = {r["seed"]: _percent(r["dense_metrics"]) for r in rows if "dense_metrics" in r}
    return statistics.fmean(by_seed.values()) if by_seed else None


def _percent(scores: Mapping[str, float]) -> float:
    """The task's main metric, which comes first."""
    return 100 * next(iter(scores.values()))

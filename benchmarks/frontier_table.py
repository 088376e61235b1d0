"""Table and picture of the frontier at equal bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import panels_of, save_figure
from benchmarks.named_lines import LINE_INCHES, line_styles, log_ticks, name_lines
from benchmarks.recipe import rise
from hf_lowrank.errors import ConfigError

Row = Mapping[str, Any]
Error = Callable[[Row], float]
_OWN = "low rank"
_SMALLEST = 1e-6  # error that is drawn
_FAR = 3.0  # times the median
_RING = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "color": "0.3"}


def errors_of(rows: Sequence[Row]) -> dict[str, Error]:
    """What is to be small beside the bytes: perplexity of each text; or what scores lack of 1."""
    texts = dict.fromkeys(text for row in rows for text in row.get("texts", {}))
    if texts:
        return {text: partial(_perplexity, text) for text in texts}
    scores = dict.fromkeys(score for row in rows for score in row["scores"])
    return {score: partial(_lack, score) for score in scores}


def pareto(rows: Sequence[Row], error: Error) -> set[str]:
    """Names of the rows that no other is as good as in bytes and error, and better in one."""
    places = [(row["bytes"], error(row)) for row in rows]
    return {
        row["row"]
        for row, (size, own) in zip(rows, places, strict=True)
        if not any(s <= size and e <= own and (s, e) != (size, own) for s, e in places)
    }


def format_frontier(rows: Sequence[Row]) -> str:
    """A row for each file, the largest first; those on a frontier say on which."""
    errors = errors_of(rows)
    fronts = {name: pareto(rows, error) for name, error in errors.items()}
    has_kl = any("kl" in row for row in rows)
    phases = list(dict.fromkeys(phase for row in rows for phase in row["speed"]))
    kl = ["KL mean / median / 99 %"] * has_kl
    lines = [["row", "MB", "MB in memory", "bits", *errors, *kl, *phases, "minutes", "Pareto"]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 2) + ["---"])
    for row in sorted(rows, key=lambda each: (-each["bytes"], each["row"])):
        name, on = row["row"], [each for each in errors if row["row"] in fronts[each]]
        cells = [f"**{name}**" if on else name]
        cells += [f"{row[key] / 1e6:.1f}" for key in ("bytes", "resident_bytes")]
        cells += [f"{row['bits']:.2f}", *(_quality(row, each) for each in errors)]
        if has_kl:
            cells.append(" / ".join(f"{row['kl'][key]:.2g}" for key in ("mean", "median", "p99")))
        found = (row["speed"][phase] for phase in phases)
        times = [each["seconds"] for each in found]
        cells += [f"{min(each['dense']) / min(each['row']):.2f}x" for each in times]
        cells += [f"{row['seconds'] / 60:.1f}", ", ".join(on)]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw_frontier(rows: Sequence[Row], path: Path) -> None:
    """Error by megabytes as an SVG file: a panel for each error, a line for each family.

    Low rank alone or in torchao's types is thick and black. A ring is around rows on the frontier.
    Rows with more than three times the median bytes or error are named below the panel instead.

    Args:
        rows: Of `measure_frontier` or `measure_embedding_frontier`.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or there is no row.
    """
    if not rows:
        raise ConfigError("There is no row of the frontier to draw; run the rows first.")
    errors = errors_of(rows)
    families = {row["family"]: ("-", row["family"].startswith(_OWN)) for row in rows}
    styles = line_styles(dict(sorted(families.items())))
    names = LINE_INCHES * max(20, len(families))
    figure, panels = panels_of(len(errors), (6.6, 1.3 + names))
    label = "perplexity" if "texts" in rows[0] else "1 - score"
    for axes, (title, error) in zip(panels, errors.items(), strict=True):
        near = _near(rows, error)
        _draw_lines(axes, near, error, pareto(rows, error), styles, names)
        axes.set_title(title, loc="left", fontsize=10)
        left_out = [row["row"] for row in rows if row not in near]
        lines = ["MB of the file (rings: the frontier)"]
        lines += [f"far off: {', '.join(left_out)}"] * bool(left_out)
        axes.set_xlabel("\n".join(lines), fontsize=8)
        axes.set_ylabel(f"{label} (log scale)", fontsize=8)
        log_ticks(axes)
    save_figure(figure, path)


def _near(rows: Sequence[Row], error: Error) -> list[Row]:
    """Rows without those so large or so bad that all others would be drawn as one point."""
    size, bad = (statistics.median(map(of, rows)) for of in (_size, error))
    return [row for row in rows if _size(row) <= _FAR * size and error(row) <= _FAR * bad]


def _size(row: Row) -> float:
    return float(row["bytes"])


def _draw_lines(
    axes: Any,  # noqa: ANN401
    rows: Sequence[Row],
    error: Error,
    front: set[str],
    styles: Mapping[str, Mapping[str, Any]],
    height: float,
) -> None:
    axes.set_yscale("log")
    ends = {}
    for family in styles:
        own = sorted((row for row in rows if row["family"] == family), key=_size)
        points = [(row["bytes"] / 1e6, max(_SMALLEST, error(row))) for row in own]
        for (x, y), row in zip(points, own, strict=True):
            if row["row"] in front:
                axes.plot([x], [y], **_RING)
        if points:
            axes.plot(*zip(*points, strict=True), **styles[family])
            ends[family] = points[-1]
    _name(axes, ends, styles, height)


def _name(
    axes: Any,  # noqa: ANN401
    ends: Mapping[str, tuple[float, float]],
    styles: Mapping[str, Mapping[str, Any]],
    height: float,
) -> None:
    """Names of the lines at the right edge."""
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    to_panel = axes.transData + axes.transAxes.inverted()
    places = {name: tuple(to_panel.transform(end)) for name, end in ends.items()}
    name_lines(axes, places, styles, LINE_INCHES / height)


def _perplexity(text: str, row: Row) -> float:
    return float(row["texts"][text]["perplexity_after"])


def _lack(score: str, row: Row) -> float:
    return 1 - float(row["scores"][score])


def _quality(row: Row, name: str) -> str:
    """Perplexity and its rise, or a score."""
    return rise(row["texts"][name]) if "texts" in row else f"{row['scores'][name]:.4f}"

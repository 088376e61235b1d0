"""Table and picture of the frontier at equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import panels_of, save_figure
from benchmarks.named_lines import LINE_INCHES, line_styles, name_lines, plain_frame
from benchmarks.recipe import rise
from hf_lowrank.errors import ConfigError

Row = Mapping[str, Any]
_OWN = "low rank"
_HEADER = ("row", "MB", "MB in memory", "bits")
_MEASURES = ("KL mean / median / 99 %", "prefill", "decode", "minutes", "Pareto")


def pareto(rows: Sequence[Row], text: str) -> set[str]:
    """Names of the rows that no other is as good as in bytes and perplexity, and better in one."""

    def place(row: Row) -> tuple[float, float]:
        return row["bytes"], row["texts"][text]["perplexity_after"]

    best = set()
    for row in rows:
        size, loss = place(row)
        others = (place(other) for other in rows)
        if not any(s <= size and p <= loss and (s, p) != (size, loss) for s, p in others):
            best.add(row["row"])
    return best


def format_frontier(rows: Sequence[Row]) -> str:
    """A row for each file, the largest first; those on a text's frontier name it."""
    texts = list(dict.fromkeys(text for row in rows for text in row["texts"]))
    fronts = {text: pareto(rows, text) for text in texts}
    lines = [[*_HEADER, *texts, *_MEASURES]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 2) + ["---"])
    for row in sorted(rows, key=lambda each: (-each["bytes"], each["row"])):
        name, on = row["row"], [text for text in texts if row["row"] in fronts[text]]
        cells = [f"**{name}**" if on else name]
        cells += [f"{row[key] / 1e6:.1f}" for key in ("bytes", "resident_bytes")]
        cells += [f"{row['bits']:.2f}", *(rise(row["texts"][text]) for text in texts)]
        cells.append(" / ".join(f"{row['kl'][key]:.2g}" for key in ("mean", "median", "p99")))
        cells += [_speed(row["speed"], phase) for phase in ("prefill", "decode")]
        cells += [f"{row['seconds'] / 60:.1f}", ", ".join(on)]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw_frontier(rows: Sequence[Row], path: Path) -> None:
    """Perplexity by megabytes as an SVG file: a panel for each text, a line for each family.

    Low rank alone or in torchao's types is thick and black. A ring is around rows on the frontier.

    Args:
        rows: Of `measure_frontier`.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or there is no row.
    """
    if not rows:
        raise ConfigError("There is no row of the frontier to draw.")
    texts = list(rows[0]["texts"])
    families = sorted({row["family"] for row in rows})
    styles = line_styles({name: ("-", name.startswith(_OWN)) for name in families})
    height = 1.1 + LINE_INCHES * max(20, len(families))
    figure, panels = panels_of(len(texts), (6.6, height))
    for axes, text in zip(panels, texts, strict=True):
        axes.set_yscale("log")
        front, ends = pareto(rows, text), {}
        for family in families:
            points = sorted(
                (row["bytes"] / 1e6, row["texts"][text]["perplexity_after"], row["row"] in front)
                for row in rows
                if row["family"] == family
            )
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], **styles[family])
            ringed = [(x, y) for x, y, is_best in points if is_best]
            ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "color": "0.3"}
            axes.plot([x for x, _ in ringed], [y for _, y in ringed], linestyle="", **ring)
            ends[family] = points[-1][:2]
        _name(axes, ends, styles, height)
        axes.set_title(text, loc="left", fontsize=10)
        axes.set_xlabel("MB of the file (rings: the frontier)", fontsize=8)
        axes.set_ylabel("perplexity (log scale)", fontsize=8)
        plain_frame(axes)
    save_figure(figure, path)


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


def _speed(speed: Mapping[str, Any], phase: str) -> str:
    """Tokens per second, and how many times the dense model's in the same run."""
    return f"{speed['row'][f'{phase}_tokens_per_second']:.1f} ({speed['ratios'][phase]:.2f}x)"

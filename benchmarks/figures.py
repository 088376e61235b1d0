"""Pictures of benchmark rows, drawn by matplotlib (extra `plots`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.small_svg import small_svg
from hf_lowrank.errors import ConfigError
from hf_lowrank.files import write_text

# Text as text, in a font that is everywhere or one of its width.
_SMALL: dict[Any, Any] = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}
_POINTS = 64  # of a drawn spectrum, at most
# Told apart without colour.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "0.6", "linestyle": ":"},
    {"color": "0.0", "linestyle": "-"},
    {"color": "0.3", "linestyle": "--"},
)


def draw_ranks(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Ranks by block and kind of layer, one heat map for each row, as one SVG file.

    Args:
        rows: Rows of the GLUE table with `task`, `method`, `param_ratio` and `ranks`.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or there is no row.
    """
    if not rows:
        raise ConfigError("There is no row to draw ranks of; run the rows first.")
    figure, panels = panels_of(len(rows))
    for axes, row in zip(panels, rows, strict=True):
        _draw(axes, row)
    save_figure(figure, path)


def draw_spectra(
    spectra: Mapping[str, Mapping[str, Sequence[float]]], path: Path, floor: float = 1e-4
) -> None:
    """Mean spectrum of each kind of layer, one line for each way, as one SVG file.

    Args:
        spectra: `sigma / sigma_1` of each layer by its name, descending, by way ("dense", ...).
        path: Where the picture goes.
        floor: Smaller values are drawn there.

    Raises:
        ConfigError: matplotlib is missing, or there is no layer.
    """
    names = list(next(iter(spectra.values()), {}))
    if not names:
        raise ConfigError("There is no layer to draw spectra of; name other layers.")
    _, kinds, places = blocks_and_kinds(names)
    figure, panels = panels_of(len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        members = [name for name in names if places[name][1] == kind]
        for (way, layers), style in zip(spectra.items(), cycle(_LINES), strict=False):
            # The layers of a kind have one shape; where they have not, the shortest decides.
            columns = zip(*(layers[name] for name in members), strict=False)
            mean = [max(floor, sum(column) / len(column)) for column in columns]
            drawn = range(0, len(mean), -(-len(mean) // _POINTS))
            axes.plot([i + 1 for i in drawn], [mean[i] for i in drawn], label=way, **style)
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_title(_short(kind), fontsize=9)
        axes.set_xlabel("component", fontsize=8)
    panels[0].set_ylabel("sigma / sigma_1, mean over the blocks", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def blocks_and_kinds(
    names: Sequence[str],
) -> tuple[list[str], list[str], dict[str, tuple[str, str]]]:
    """Block numbers, kinds of layers, and for each name its place: `encoder.layer.3.key` is 3, key.

    The kind is what follows the first number in the name.
    """
    places = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            places[name] = ("", name)
        else:
            places[name] = (parts[at], ".".join(parts[at + 1 :]))
    blocks = sorted({block for block, _ in places.values()}, key=lambda b: int(b or -1))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    return blocks, kinds, places


def _draw(axes: Any, row: Mapping[str, Any]) -> None:  # noqa: ANN401
    ranks = row["ranks"]
    blocks, kinds, places = blocks_and_kinds(list(ranks))
    values = [[float("nan")] * len(kinds) for _ in blocks]
    darkest = 1.6 * max((rank for rank in ranks.values() if rank is not None), default=1)
    for name, (block, kind) in places.items():
        rank = ranks[name]
        line, column = blocks.index(block), kinds.index(kind)
        values[line][column] = darkest if rank is None else rank
        text, color = ("dense", "white") if rank is None else (str(rank), "black")
        axes.text(column, line, text, ha="center", va="center", fontsize=7, color=color)
    axes.imshow(values, cmap="Greys", vmin=0, vmax=darkest, aspect="auto")
    axes.set_xticks(range(len(kinds)), map(_short, kinds), rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axes.set_ylabel("block", fontsize=8)
    axes.set_title(f"{row['task']} {row['method']} {row['param_ratio']:g}", fontsize=9)


def panels_of(
    count: int, size: tuple[float, float] = (4.2, 3.0), columns: int = 3
) -> tuple[Any, list[Any]]:
    """A figure and so many panels in rows.

    Args:
        count: Panels.
        size: Width and height of each in inches.
        columns: Panels in a row, at most.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("Pictures need matplotlib: pip install 'hf-lowrank[plots]'.") from error
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def save_figure(figure: Any, path: Path) -> None:  # noqa: ANN401
    """Writes a figure as a small SVG file, its text as text."""
    import matplotlib as mpl

    drawn = io.StringIO()
    settings: Any = _SMALL | {"svg.hashsalt": path.name}
    with mpl.rc_context(settings):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_text(path, small_svg(drawn.getvalue()))


def _short(kind: str) -> str:
    return kind.replace(".dense", "").replace("attention.self.", "")

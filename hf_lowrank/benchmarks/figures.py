"""Pictures of benchmark rows, drawn by matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.errors import ConfigError


def draw_ranks(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Ranks by block and kind of layer, one heat map for each row, as one SVG file.

    Args:
        rows: Rows of the GLUE table with `task`, `method`, `param_ratio` and `ranks`.
        path: Where the picture goes.

    Raises:
        ConfigError: matplotlib is missing, or there is no row.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("Pictures need matplotlib: pip install 'hf-lowrank[plots]'.") from error
    if not rows:
        raise ConfigError("There is no row to draw ranks of.")
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, row in zip(grid.flat, rows, strict=False):
        _draw(axes, row)
    for axes in grid.flat[len(rows) :]:
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


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
    for name, (block, kind) in places.items():
        if ranks[name] is not None:
            values[blocks.index(block)][kinds.index(kind)] = ranks[name]
    largest = max((rank for rank in ranks.values() if rank is not None), default=1)
    axes.imshow(values, cmap="Greys", vmin=0, vmax=1.6 * largest, aspect="auto")
    for name, (block, kind) in places.items():
        text = "dense" if ranks[name] is None else str(ranks[name])
        place = kinds.index(kind), blocks.index(block)
        axes.text(*place, text, ha="center", va="center", fontsize=7)
    short = [kind.replace(".dense", "").replace("attention.self.", "") for kind in kinds]
    axes.set_xticks(range(len(kinds)), short, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axes.set_ylabel("block", fontsize=8)
    axes.set_title(f"{row['task']} {row['method']} {row['param_ratio']:g}", fontsize=9)

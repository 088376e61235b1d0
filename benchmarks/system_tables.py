"""The comparison of systems as text: a line while it runs, and two Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.catalogue import SYSTEMS
from benchmarks.system_rows import all_texts, dense_row, texts_of

_POSITIONS = """\
The same systems by the three questions of the IJCAI 2025 paper: a rank for each layer or one rule
for all, theory or heuristic, during or after training. Then what was measured: the rise of the loss
over the dense model in nats, with its standard error, at each size on each text."""

_BASELINE = "kfac+price"
_SHARES = f"The rise of the loss, and the seconds, as a share of those of {_BASELINE}."


def format_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables, the first with the dense model on top, as Markdown."""
    tables = f"{format_systems(rows)}\n\n{_POSITIONS}\n\n{format_positions(rows)}"
    shares = format_shares(rows)
    return f"{tables}\n\n{_SHARES}\n\n{shares}" if shares else tables


def format_row(row: Mapping[str, Any]) -> str:
    """One line for the terminal while the comparison runs."""
    if "error" in row:
        outcome = row["error"]
    else:
        figures = (f"{name} {_perplexity(row, name)}" for name in texts_of(row))
        outcome = f"perplexity {', '.join(figures)}; {row['total_seconds']:.1f} s"
    return f"{row['name']:>22} {row['param_ratio']:.2f}: {outcome}"


def format_systems(rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as a Markdown table, one line for each system and size, the dense model first.

    The dense model has no line where no row was measured.
    """
    texts = all_texts(rows)
    heads = ["size", "system", "metric", "rule", "kept parameters"]
    heads += [f"perplexity, {name}" for name in texts]
    heads += ["seconds", "of these search", "decompositions", "forward", "backward", "peak MiB"]
    lines = [heads, *[["---:", "---", "---", "---", *["---:"] * (len(heads) - 4)]]]
    if dense := dense_row(rows):
        cells = [f"{dense['param_ratio']:g}", dense["name"], "", "", _whole(dense)]
        cells += [_number(dense[text]["perplexity"]) for text in texts]
        lines.append(cells + [""] * (len(heads) - len(cells)))
    for row in sorted(rows, key=lambda row: -row["param_ratio"]):
        cells = [f"{row['param_ratio']:g}", row["name"], row["metric"], row["rule"]]
        if "error" in row:
            cells += [f"failed: {row['error']}", *[""] * (len(heads) - 5)]
        else:
            cells += [_whole(row), *(_perplexity(row, name) for name in texts)]
            cells += [f"{row[key]:.1f}" for key in ("total_seconds", "search_seconds")]
            cells += [str(row[key]) for key in ("decompositions", "forwards", "backwards")]
            cells.append(f"{row['peak_mib']:.0f}")
        lines.append(cells)
    return _table(lines)


def format_positions(rows: Sequence[Mapping[str, Any]]) -> str:
    """How each system is classed, and the rise of the loss that was measured, as a Markdown table.

    Returns:
        A line for each system of the catalogue that has a row: its source, the three properties of
        `System`, and for each text and size the rise of the loss in nats with its standard error;
        "failed" where the row failed, "inf" where the loss overflowed, empty where there is none.
    """
    texts = all_texts(rows)
    sizes = sorted({row["param_ratio"] for row in rows}, reverse=True)
    found = {(row["name"], row["param_ratio"]): row for row in rows}
    heads = ["system", "source", "ranks", "basis", "stage"]
    lines = [heads + [f"{text} {size:g}" for text in texts for size in sizes]]
    lines.append(["---"] * len(heads) + ["---:"] * (len(texts) * len(sizes)))
    names = {row["name"] for row in rows}
    for system in (each for each in SYSTEMS if each.name in names):
        cells = [system.name, system.source, system.scope, system.basis, system.stage]
        cells += [_rise(found.get((system.name, size)), text) for text in texts for size in sizes]
        lines.append(cells)
    return _table(lines)


def format_shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rise of the loss and seconds of each row over those of `kfac+price`, as a Markdown table.

    Empty where that was not measured; a cell is empty where either row has no such figure.
    """
    texts = all_texts(rows)
    base = {row["param_ratio"]: row for row in rows if row["name"] == _BASELINE and texts_of(row)}
    lines = [["size", "system", *texts, "seconds"], ["---:", "---", *["---:"] * (len(texts) + 1)]]
    for row in sorted(rows, key=lambda row: -row["param_ratio"]):
        other = base.get(row["param_ratio"])
        if other is not None and row is not other and texts_of(row):
            cells = [f"{row['param_ratio']:g}", row["name"]]
            for text in texts:
                found = [each[text]["loss_difference"] for each in (row, other) if text in each]
                fits = len(found) == 2 and None not in found and found[1] > 0
                cells.append(f"{found[0] / found[1]:.2f}" if fits else "")
            lines.append([*cells, f"{row['total_seconds'] / other['total_seconds']:.1f}"])
    return _table(lines) if len(lines) > 2 else ""


def _rise(row: Mapping[str, Any] | None, text: str) -> str:
    if row is None:
        return ""
    if text not in row:
        return "failed" if "error" in row else ""
    error = row[text]["standard_error"]
    rise = _number(row[text]["loss_difference"], ".3f")
    return rise if error is None or not math.isfinite(error) else f"{rise} ± {error:.3f}"


def _perplexity(row: Mapping[str, Any], name: str) -> str:
    return _number(row[name]["perplexity_after"]) if name in row else ""


def _number(value: float | None, form: str = ".4g") -> str:
    """A value that may have been too large for JSON."""
    return "inf" if value is None else f"{value:{form}}"


def _whole(row: Mapping[str, Any]) -> str:
    return f"{row['kept_parameters']:,}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

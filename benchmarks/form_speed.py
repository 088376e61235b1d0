"""Seconds of one layer, dense, as two factors and compact, at equal numbers stored.

The forms take turns in one process, so that what disturbs the machine disturbs all of them; of each
the median counts, and only ratios are worth quoting.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.rank_within import rank_within
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.forms.stored_form import stored_form
from hf_lowrank.report.provenance import write_result

FORMS = ("factors", "compact")


@dataclass
class FormSpeedArguments:
    """Arguments of the comparison of stored forms by speed."""

    shapes: list[str] | None = option(
        None, "Layers as OUTxIN; default 2048x2048 5632x2048 2048x5632."
    )
    param_ratio: list[float] | None = option(None, "Sizes; default 0.8 0.6.")
    tokens: list[int] | None = option(None, "Rows of the input; default 1 256.")
    dtypes: list[str] | None = option(None, "Data types; default float32 bfloat16.")
    seconds: float = option(3.0, "Time for each comparison, at least.")
    threads: int = option(1, "Threads of torch.")
    output: str = option("outputs/form_speed.json", "JSON file of the result.")


def compare_speeds(args: FormSpeedArguments) -> None:
    """Writes a row for each shape, size, number of tokens and data type."""
    shapes = [_shape(each) for each in args.shapes or ["2048x2048", "5632x2048", "2048x5632"]]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [
        _compare(shape, ratio, tokens, dtype, args.seconds)
        for dtype in args.dtypes or ["float32", "bfloat16"]
        for tokens in args.tokens or [1, 256]
        for shape in shapes
        for ratio in args.param_ratio or [0.8, 0.6]
    ]
    print(format_speeds(rows))
    write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and min(int(rows), int(columns)) >= 2):
        raise ConfigError(f"A shape is written OUTxIN, such as 2048x5632; got {text!r}.")
    return int(rows), int(columns)


@torch.inference_mode()
def _compare(
    shape: tuple[int, int], ratio: float, tokens: int, dtype: str, seconds: float
) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    inputs = torch.randn(tokens, shape[1], dtype=kind)
    layers: dict[str, nn.Module] = {"dense": nn.Linear(shape[1], shape[0], bias=False, dtype=kind)}
    ranks = {form: rank_within(shape, ratio, form) for form in FORMS}
    for form, rank in ranks.items():
        layers[form] = stored_form(form).build(shape, rank, bias=False, dtype=kind)
    times: dict[str, list[float]] = {name: [] for name in layers}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times["dense"]) < 5:
        for name, layer in layers.items():
            began = time.perf_counter()
            layer(inputs)
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    return {
        "shape": list(shape),
        "param_ratio": ratio,
        "tokens": tokens,
        "dtype": dtype,
        "ranks": ranks,
        "repeats": len(times["dense"]),
        "seconds": medians,
        "speedup": {form: medians["dense"] / medians[form] for form in FORMS},
    }


def format_speeds(rows: list[dict[str, Any]]) -> str:
    """A table: how many times faster than dense each form is."""
    lines = ["| layer | size | tokens | type | ideal | two factors | compact |", "|---" * 7 + "|"]
    for row in rows:
        size, found = row["param_ratio"], row["speedup"]
        cells = [" x ".join(map(str, row["shape"])), f"{size:g}", str(row["tokens"]), row["dtype"]]
        cells += [f"{each:.2f}" for each in (1 / size, found["factors"], found["compact"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

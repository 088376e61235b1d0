r"""The frontier at equal bytes: one row for each file that a user could download.

Every row is made, written, read again and judged as it was read: bytes of the file and in memory,
perplexity of texts that nothing is tuned on, KL to the dense model by token, speed in turn with the
dense model on one thread, minutes to make. Rows are files of their own, so that a killed run goes
on.

The demo model's weights were read from a file of 4 bits (Q4_1: 16 levels, a scale and a minimum for
each 32 numbers, 5 bits in all). They hold no more than that, so its dense rows are larger than they
need be: that file itself would be a row of 5 bits without any loss. A quantizer of 4 bits whose
groups meet these finds weights that lie on 16 levels already, which is easier than weights as they
were trained. And part of what low rank cannot drop is the rounding of that file, which is white.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.divergence import measure_divergence, summary
from benchmarks.frontier_rows import Workshop, in_turn_speed, missing_rows
from benchmarks.frontier_table import draw_frontier, format_frontier
from benchmarks.recipe import RecipeArguments, judges_of, texts_of
from hf_lowrank.compression.options import Run, RunOptions
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.size import compare
from hf_lowrank.evaluation.speed import SpeedSettings, measure_speed
from hf_lowrank.inputs.own_text import OwnText
from hf_lowrank.inputs.sources import load_causal_lm
from hf_lowrank.inputs.start_token import start_text
from hf_lowrank.measuring.items import Batch
from hf_lowrank.report.provenance import write_result

SPEED_SECONDS = 120.0  # after which no further round begins


@dataclass
class FrontierArguments(RecipeArguments):
    """Arguments of the frontier at equal bytes."""

    rows: list[str] | None = option(None, "Rows to measure; default all. See frontier_rows.py.")
    prompt_tokens: int = option(128, "Tokens that are read at once when speed is measured.")
    new_tokens: int = option(16, "Tokens that are read one by one then.")
    repeats: int = option(5, "Rounds of that; each times both models.")
    picture: str | None = option(None, "SVG file for a picture of all rows.")
    output_dir: str = option("outputs/frontier", "Folder of rows; those in it are not run again.")


def measure_frontier(args: FrontierArguments) -> None:
    """Every row that is not there yet, a file for each; then the table of all that are.

    Raises:
        ConfigError: There is no such row, or the data type is left open.
    """
    folder = Path(args.output_dir)
    if args.dtype == "auto":
        raise ConfigError("dtype must be named here: rows are stored in one and computed in it.")
    torch.set_num_threads(1)
    if missing := missing_rows(args.rows, folder):
        model, tokenizer = load_causal_lm(args.model, args.dtype)
        own_text = OwnText(model, tokenizer)
        texts = texts_of(args, (args.calibration or ["demo"])[0], own_text)
        judges = judges_of(args, own_text).texts
        run = Run(texts, RunOptions(cache_dir=args.cache_dir or str(folder / "cache")))
        shop = Workshop(model, tokenizer, run, folder / "seconds")
        common = {"arguments": vars(args), "start_token": start_text(tokenizer)}
        for name, row in missing.items():
            found = shop.measure(row, args.dtype, lambda made: _judge(model, made, judges, args))
            write_result(folder / f"{name}.json", {**common, "row": name, **found})
    rows = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    print(format_frontier(rows))
    if args.picture:
        draw_frontier(rows, Path(args.picture))


def _judge(
    dense: nn.Module,
    model: nn.Module,
    judges: Mapping[str, Sequence[Batch]],
    args: FrontierArguments,
) -> dict[str, Any]:
    """Perplexities, distances to the dense model, and speeds of a row."""
    texts, divergences = {}, []
    for text, batches in judges.items():
        found = measure_divergence(dense, model, batches, f"evaluate, {text}")
        texts[text] = asdict(compare(found.before, found.after)) | {"kl": summary(found.kl)}
        divergences.append(found.kl)
    kl = summary(torch.cat(divergences))
    return {"texts": texts, "kl": kl, "speed": _speed(dense, model, args)}


def _speed(dense: nn.Module, model: nn.Module, args: FrontierArguments) -> dict[str, Any]:
    """Tokens per second of a row by phase, and how many times the dense model's that is."""
    settings = SpeedSettings(
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        max_seconds=SPEED_SECONDS,
    )
    found = measure_speed({"dense": dense, "row": model}, settings)
    before, after = found["dense"], found["row"]
    return {
        "prefill": in_turn_speed(before.prefill, after.prefill, args.prompt_tokens),
        "decode": in_turn_speed(before.decode, after.decode, args.new_tokens),
    }

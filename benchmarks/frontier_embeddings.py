"""The frontier at equal bytes for an embedding model: scores, likeness to dense, speed.

The rows are those of `frontier.py`, but that cuts are priced on the calibration text alone, as is
the default for embeddings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.embeddings import METHODS, EmbeddingsArguments, Judge, judge_of, sentences_of
from benchmarks.frontier_rows import Workshop, in_turn_speed, missing_rows
from benchmarks.frontier_table import draw_frontier, format_frontier
from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.options import Run, RunOptions, Texts
from hf_lowrank.config import LowRankConfig, option
from hf_lowrank.evaluation.speed import in_turn, now
from hf_lowrank.format.strict import load
from hf_lowrank.inputs.encoders import Encoder, load_encoder
from hf_lowrank.inputs.sources import DTYPES, is_compressed
from hf_lowrank.measuring.items import Batch, eval_mode
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.provenance import write_result

ROUNDS, SECONDS = 5, 60.0  # of the timing; after so many no further round begins
_RECIPE = "price and channels, compact"


@dataclass
class EmbeddingFrontierArguments(EmbeddingsArguments):
    """Arguments of the frontier at equal bytes for an embedding model."""

    rows: list[str] | None = option(None, "Rows to measure; default all. See frontier_rows.py.")
    picture: str | None = option(None, "SVG file for a picture of all rows.")
    output_dir: str = option(
        "outputs/frontier_embeddings", "Folder of rows; those in it are not run again."
    )


def measure_embedding_frontier(args: EmbeddingFrontierArguments) -> None:
    """Every row that is not there yet, a file for each; then the table of all that are.

    Raises:
        ConfigError: There is no such row.
    """
    folder = Path(args.output_dir)
    torch.set_num_threads(1)
    if missing := missing_rows(args.rows, folder):
        encoder = load_encoder(args.model, dtype="float32")
        judge, sets = judge_of(args, encoder), sentences_of(args, encoder)
        options = RunOptions(encoder.loss, cache_dir=folder / "cache")
        run = Run(Texts(sets.calibration, sets.held_out), options)
        shop = Workshop(
            encoder.model, encoder.tokenizer, run, folder / "seconds", _load, _analysis_of
        )
        for name, row in missing.items():
            found = shop.measure(row, "float32", partial(_judge, encoder, judge))
            write_result(folder / f"{name}.json", {"arguments": vars(args), "row": name, **found})
    rows = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    print(format_frontier(rows))
    if args.picture:
        draw_frontier(rows, Path(args.picture))


def _analysis_of(model: nn.Module, run: Run) -> Analysis:
    config = LowRankConfig(param_ratio=1.0, **METHODS[_RECIPE])
    return analyze(model, find_targets(model, config), config, run)


def _load(source: str, dtype: str) -> nn.Module:
    """An encoder from a folder, dense or compressed."""
    if is_compressed(source):
        return load(source, dtype=DTYPES[dtype])
    return load_encoder(source, dtype=dtype).model


def _judge(encoder: Encoder, judge: Judge, model: nn.Module) -> dict[str, Any]:
    """Scores of a row, and sentences per second on the longest of what it was judged on."""
    batch = judge.batches[-1]
    models = {"dense": encoder.model, "row": model}
    found = in_turn(models, partial(_seconds, batch), ROUNDS, SECONDS)
    count, tokens = batch["input_ids"].shape
    speed = {f"{count} x {tokens}": in_turn_speed(found["dense"], found["row"], count)}
    return {"scores": judge.measure(model, encoder), "speed": speed}


@torch.no_grad()
def _seconds(batch: Batch, model: nn.Module) -> float:
    with eval_mode(model):
        start = now(torch.device("cpu"))
        model(**batch)
        return now(torch.device("cpu")) - start

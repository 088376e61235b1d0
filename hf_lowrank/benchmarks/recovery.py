"""What training the factors after a cut gives, on text like the calibration text and unlike it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.analysis import analyze
from hf_lowrank.arguments import argument
from hf_lowrank.benchmarks.record import write_result
from hf_lowrank.config import LowRankConfig
from hf_lowrank.data.text import token_batches
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.losses import Batch
from hf_lowrank.recovery import RecoverySettings, recover_
from hf_lowrank.sources import load_causal_lm
from hf_lowrank.surgery import factorize_, restore_


@dataclass
class RecoveryArguments:
    """Arguments of the measurement of recovery."""

    model: str = argument("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = argument(None, "Sizes; default 0.6 0.4.")
    recover_steps: int = argument(60, "Steps of training the factors.")
    calibration: str = argument("demo", "Text for the moments and the training.")
    calibration_sequences: int = argument(48, "Its token windows.")
    held_out_sequences: int = argument(16, "Windows from its end on which the training is judged.")
    evaluation: list[str] | None = argument(None, "Evaluation texts; default 'demo'.")
    evaluation_sequences: int = argument(32, "Token windows of each.")
    sequence_length: int = argument(256, "Tokens in each window.")
    dtype: str = argument("auto", "Data type of the model.")
    output: str = argument("outputs/recovery.json", "JSON file with the result.")


def measure_recoveries(args: RecoveryArguments) -> None:
    """Perplexity before and after recovery on each evaluation text."""
    model, tokenizer = load_causal_lm(args.model, args.dtype)
    read = partial(token_batches, tokenizer=tokenizer, sequence_length=args.sequence_length)
    calibration = read(args.calibration, sequences=args.calibration_sequences, part=(0.0, 0.75))
    held_out = read(
        args.calibration, sequences=args.held_out_sequences, role="held_out", part=(0.75, 1.0)
    )
    evaluations = {
        Path(source).name: read(source, sequences=args.evaluation_sequences, role="evaluation")
        for source in args.evaluation or ["demo"]
    }
    result = measure_recovery(
        model,
        args.param_ratio or [0.6, 0.4],
        RecoverySettings(args.recover_steps),
        (calibration, held_out),
        evaluations,
    )
    write_result(Path(args.output), {"arguments": vars(args)} | result)


def measure_recovery(
    model: nn.Module,
    param_ratios: Sequence[float],
    settings: RecoverySettings,
    texts: tuple[Sequence[Batch], Sequence[Batch]],
    evaluations: Mapping[str, Sequence[Batch]],
) -> dict[str, Any]:
    """Perplexities of each evaluation text: dense, after the cut, after the recovery.

    Args:
        model: The dense model; it is dense again afterwards.
        param_ratios: Kept shares of the targeted parameters.
        settings: How to recover.
        texts: Calibration batches, for the moments and the training; held-out batches, on which
            the training is judged.
        evaluations: Batches by name; only the figures come from them.
    """
    calibration, held_out = texts
    analysis = analyze(model, LowRankConfig(param_ratio=1.0), calibration)

    def perplexities() -> dict[str, float]:
        return {name: measure_loss(model, part).perplexity for name, part in evaluations.items()}

    dense = perplexities()
    rows = []
    for ratio in param_ratios:
        originals = factorize_(model, analysis.spectra, analysis.plan_for_ratio(ratio))
        cut = perplexities()
        start = time.perf_counter()
        result = recover_(model, originals, calibration, held_out, settings)
        seconds = time.perf_counter() - start
        row = {"param_ratio": ratio, "cut": cut, "recovered": perplexities(), "seconds": seconds}
        rows.append(row | {"recovery": asdict(result)})
        print(format_row(rows[-1]), flush=True)
        restore_(model, originals)
    return {"dense": dense, "settings": asdict(settings), "rows": rows}


def format_row(row: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    parts = (
        f"{name} {row['cut'][name]:.4g} -> {row['recovered'][name]:.4g}" for name in row["cut"]
    )
    return f"{row['param_ratio']:g}: {', '.join(parts)}, {row['seconds'] / 60:.1f} minutes"

"""What training the factors after a cut gives, on text like the calibration text and unlike it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from hf_lowrank.analysis import analyze
from hf_lowrank.config import LowRankConfig
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.losses import Batch
from hf_lowrank.measured_prices import measure_parts, with_factors
from hf_lowrank.recovery import RecoverySettings, recover_
from hf_lowrank.surgery import factorize_, restore_


def measure_recovery(
    model: nn.Module,
    param_ratios: Sequence[float],
    settings: RecoverySettings,
    texts: tuple[Sequence[Batch], Sequence[Batch]],
    evaluations: Mapping[str, Sequence[Batch]],
    config: LowRankConfig | None = None,
) -> dict[str, Any]:
    """Perplexities of each evaluation text: dense, after the cut, after the recovery.

    Args:
        model: The dense model; it is dense again afterwards.
        param_ratios: Kept shares of the targeted parameters.
        settings: How to recover.
        texts: Calibration batches, for the moments and the training; held-out batches, on which
            the training is judged.
        evaluations: Batches by name; only the figures come from them.
        config: Settings of the cut, but for its size.

    Returns:
        `dense`, `settings` and `rows`; a row's `rise_left` is the rise of the loss over the dense
        model after the recovery as a share of that after the cut, by text.
    """
    calibration, held_out = texts
    config = config or LowRankConfig()
    analysis = analyze(model, config, calibration)

    def perplexities() -> dict[str, float]:
        return {name: measure_loss(model, part).perplexity for name, part in evaluations.items()}

    dense = perplexities()
    rows = []
    for ratio in param_ratios:
        plan = analysis.plan_for_ratio(ratio)
        if config.measured_prices:
            parts = measure_parts(model, analysis, plan, held_out)
            plan = with_factors(analysis, parts).plan_for_ratio(ratio)
        originals = factorize_(model, analysis.spectra, plan, analysis.orders)
        cut = perplexities()
        start = time.perf_counter()
        result = recover_(model, originals, calibration, held_out, settings)
        seconds = time.perf_counter() - start
        after = perplexities()
        row = {"param_ratio": ratio, "cut": cut, "recovered": after, "seconds": seconds}
        row["rise_left"] = {name: _rise_left(dense[name], cut[name], after[name]) for name in dense}
        rows.append(row | {"recovery": asdict(result)})
        print(format_row(rows[-1]), flush=True)
        restore_(model, originals)
    return {"dense": dense, "settings": asdict(settings), "rows": rows}


def _describe(rise_left: float) -> str:
    return "below the dense model" if rise_left < 0 else f"{rise_left:.0%} of the rise left"


def _rise_left(dense: float, cut: float, after: float) -> float:
    """Rise of the loss from perplexities, after recovery over before; NaN without a rise."""
    rise = math.log(cut / dense)
    return math.log(after / dense) / rise if rise > 0 else math.nan


def format_row(row: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    parts = (
        f"{name} {row['cut'][name]:.4g} -> {row['recovered'][name]:.4g} "
        f"({_describe(row['rise_left'][name])})"
        for name in row["cut"]
    )
    return f"{row['param_ratio']:g}: {', '.join(parts)}, {row['seconds'] / 60:.1f} minutes"

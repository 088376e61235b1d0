"""What training the factors after a cut gives, on text like the calibration text and unlike it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.application import Dense, dense_on_error, make_dense_again_
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.options import Run, RunOptions, Texts
from hf_lowrank.compression.recovery import RecoverySettings, recover_
from hf_lowrank.compression.stages import check_stages, earlier_stages, stage_goals
from hf_lowrank.config import LowRankConfig
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.evaluation.size import DenseSize
from hf_lowrank.measuring.items import Batch
from hf_lowrank.modeling.surgery import factorize_, factorized
from hf_lowrank.modeling.targets import find_targets


def measure_recovery(
    model: nn.Module,
    param_ratios: Sequence[float],
    settings: RecoverySettings,
    texts: tuple[Sequence[Batch], Sequence[Batch]],
    evaluations: Mapping[str, Sequence[Batch]],
    config: LowRankConfig | None = None,
    stages: int = 1,
) -> dict[str, Any]:
    """Perplexities of each evaluation text: dense, after the cut, after the recovery.

    Args:
        model: The dense model; it is dense again afterwards.
        param_ratios: Kept shares of the targeted parameters.
        settings: How to recover; the steps are those of all stages together.
        texts: Calibration batches, for the moments and the training; held-out batches, on which
            the training is judged.
        evaluations: Batches by name; only the figures come from them.
        config: Settings of the cut, but for its size.
        stages: Cuts in which each size is reached, see `compress_in_stages_`; all but the last
            are trained after with the default settings of the kind.

    Returns:
        `dense`, `settings` and `rows`, perplexities by text. A row's `cut` is after the last cut,
        its `seconds` are those of all training, `total_seconds` of everything but evaluations, and
        `rise_left` is the rise of the loss over the dense model after the recovery as a share of
        that after the cut. With channels, measured prices or stages a row also has the
        perplexities after one cut without them, `price_alone`, and the rise after the recovery as
        a share of its rise, `of_price_alone`.

    Raises:
        ConfigError: See `check_stages`.
    """
    calibration, held_out = texts
    config = config or LowRankConfig()
    for ratio in param_ratios:
        check_stages(config.replace(param_ratio=ratio), stages, settings.steps)
    started = time.perf_counter()
    targets, sets = find_targets(model, config), Texts(calibration, held_out)
    options = RunOptions(recover_steps=settings.steps, recover=settings.kind, stages=stages)
    analysis = analyze(model, targets, config, Run(sets, options))
    analysis_seconds = time.perf_counter() - started

    def perplexities() -> dict[str, float]:
        return {name: measure_loss(model, part).perplexity for name, part in evaluations.items()}

    dense, before = perplexities(), Dense(targets, DenseSize.of(model, targets))
    prices = analysis.with_config(config.replace(channels=False, measured_prices=False))
    rows = []
    for ratio in param_ratios:
        started = time.perf_counter()
        sized, run = config.replace(param_ratio=ratio), Run(sets, options)
        with dense_on_error(model, targets):
            done = earlier_stages(model, sized, before, run)
            found = analysis.with_config(sized)
            if done:
                found = analyze(model, find_targets(model, config), sized, run)
            decision = decide(model, found, run)
            factorize_(model, decision.analysis.factors, decision.plan, found.orders)
            total = time.perf_counter() - started + (0.0 if done else analysis_seconds)
            cut = perplexities()
            started = time.perf_counter()
            steps = stage_goals(ratio, stages, settings.steps)[-1][1]
            last = replace(settings, steps=steps)
            result = recover_(model, targets, calibration, held_out, last)
            seconds = time.perf_counter() - started
            after = perplexities()
        make_dense_again_(model, targets)
        row: dict[str, Any] = {"param_ratio": ratio, "cut": cut, "recovered": after}
        row["seconds"] = seconds + run.stopwatch.seconds.get("recovery", 0.0)
        row["total_seconds"] = total + seconds
        row["rise_left"] = _rises_left(dense, cut, after)
        if config.channels or config.measured_prices or stages > 1:
            with factorized(model, prices.factors, prices.plan_for_ratio(ratio)):
                alone = perplexities()
            row |= {"price_alone": alone, "of_price_alone": _rises_left(dense, alone, after)}
        row["stages"] = [stage.recovery and asdict(stage.recovery) for stage in done]
        rows.append(row | {"recovery": asdict(result)})
        print(format_row(rows[-1]), flush=True)
    return {"dense": dense, "settings": asdict(settings), "rows": rows}


def _describe(rise_left: float) -> str:
    if math.isnan(rise_left):
        return "the cut model is no worse than the dense one"
    return "below the dense model" if rise_left < 0 else f"{rise_left:.0%} of the rise left"


def _rises_left(
    dense: Mapping[str, float], cut: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, float]:
    """Rise of the loss by text from perplexities, after over cut; NaN where the cut has none."""
    rises = {name: math.log(cut[name] / dense[name]) for name in dense}
    return {
        name: math.log(after[name] / dense[name]) / rise if rise > 0 else math.nan
        for name, rise in rises.items()
    }


def format_row(row: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    parts = (
        f"{name} {row['cut'][name]:.4g} -> {row['recovered'][name]:.4g} "
        f"({_describe(row['rise_left'][name])})"
        for name in row["cut"]
    )
    minutes = f"{row['seconds'] / 60:.1f} minutes, {row['total_seconds'] / 60:.1f} with the cut"
    line = f"{row['param_ratio']:g}: {', '.join(parts)}, {minutes}"
    if "of_price_alone" not in row:
        return line
    shares = (f"{name} {share:.2f}" for name, share in row["of_price_alone"].items())
    return f"{line}; rise as a share of that of kfac with price alone: {', '.join(shares)}"

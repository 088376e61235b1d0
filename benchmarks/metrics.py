"""Every metric with every rule at several sizes: one model, one calibration set, one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_lowrank.compression.analysis import Analysis, decompose_layers
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.evaluation.perplexity import LossMeasurement, measure_loss
from hf_lowrank.evaluation.size import compare
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import Batch
from hf_lowrank.modeling.surgery import factorized
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import predicted_rise

# On a dense model, where all rows have as many weights, these equal `plain` and `whitened`.
_FOR_PRUNED_WEIGHTS = ("sparsity", "sparsity-whitened")


def compare_metrics(
    model: nn.Module,
    param_ratios: Sequence[float],
    calibration: Sequence[Batch],
    evaluation: Sequence[Batch],
) -> dict[str, Any]:
    """Perplexity of every metric and rule at every size, and the seconds of each phase.

    Returns:
        `dense_perplexity`, `rows` (one for each metric, rule and ratio) and `seconds`.
    """
    targets = find_targets(model, LowRankConfig(param_ratio=1.0))
    shapes = {name: linear_shape(layer) for name, layer in targets.items()}
    seconds = {"forward_backward": time_forward_backward(model, calibration)}
    start = time.perf_counter()
    kfac = METRICS["kfac"]
    weighted = collect_moments(model, targets, calibration, kfac.needs, even=kfac.even)
    seconds["statistics_kfac"] = time.perf_counter() - start
    all_needs = frozenset().union(*(m.needs for m in METRICS.values() if not m.even))
    moments = collect_moments(model, targets, calibration, all_needs)
    before = measure_loss(model, evaluation, progress="evaluate dense")
    rows: list[dict[str, Any]] = []
    for metric in (name for name in METRICS if name not in _FOR_PRUNED_WEIGHTS):
        config = LowRankConfig(param_ratio=1.0, metric=metric, form="factors")
        start = time.perf_counter()
        spectra, factors, failures = decompose_layers(
            targets, dict(weighted if METRICS[metric].even else moments), config
        )
        seconds[f"decomposition_{metric}"] = time.perf_counter() - start
        for rule in RULES:
            if rule == "price" and metric != "kfac":
                continue
            analysis = Analysis(
                config.replace(rule=rule),
                shapes,
                spectra,
                factors,
                failures,
                dict.fromkeys(failures),
            )
            for ratio in param_ratios:
                rows.append(_measure_cell(model, analysis, ratio, before, evaluation, seconds))
                print(format_row(rows[-1]), flush=True)
    return {"dense_perplexity": before.perplexity, "rows": rows, "seconds": seconds}


def _measure_cell(
    model: nn.Module,
    analysis: Analysis,
    param_ratio: float,
    before: LossMeasurement,
    evaluation: Sequence[Batch],
    seconds: dict[str, float],
) -> dict[str, Any]:
    start = time.perf_counter()
    plan = analysis.plan_for_ratio(param_ratio)
    with factorized(model, analysis.factors, plan):
        another = time.perf_counter() - start
        after = measure_loss(model, evaluation, progress="evaluate compressed")
    seconds["another_ratio"] = max(another, seconds.get("another_ratio", 0.0))
    found = compare(before, after)
    return {
        "metric": analysis.config.metric,
        "rule": analysis.config.rule,
        "param_ratio": param_ratio,
        "kept_parameters": plan.kept_parameters,
        "dense_parameters": plan.dense_parameters,
        "perplexity": found.perplexity_after,
        "loss_difference": found.loss_difference,
        "standard_error": found.standard_error,
        "predicted_loss_difference": predicted_rise(analysis.spectra, plan),
    }


def time_forward_backward(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Seconds of a plain forward and backward pass over the batches, all gradients included."""
    start = time.perf_counter()
    for batch in batches:
        with torch.enable_grad():
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        model.zero_grad()
    return time.perf_counter() - start


def format_row(row: dict[str, Any]) -> str:
    """One line for the terminal while the comparison runs."""
    return (
        f"{row['metric']:>16} {row['rule']:>9} {row['param_ratio']:.2f}: "
        f"perplexity {row['perplexity']:.4g}"
    )


def format_metrics(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table, one column for each ratio."""
    ratios = sorted({row["param_ratio"] for row in result["rows"]}, reverse=True)
    cells = {(r["metric"], r["rule"], r["param_ratio"]): r["perplexity"] for r in result["rows"]}
    pairs = dict.fromkeys((row["metric"], row["rule"]) for row in result["rows"])
    lines = [["metric", "rule", *(f"{ratio:g}" for ratio in ratios)]]
    lines.append(["---", "---", *("---:" for _ in ratios)])
    for metric, rule in pairs:
        values = (f"{cells[metric, rule, ratio]:.4g}" for ratio in ratios)
        lines.append([metric, rule, *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

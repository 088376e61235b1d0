"""How far the predictions of the loss hold on the way to a truncation (docs/methods.md, 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.perturbation_figure import draw_ranges, range_title
from benchmarks.perturbation_range import (
    PerturbationPoint,
    format_range,
    linear_range,
    measure_range,
)
from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.joint.disjoint import check_disjoint
from hf_lowrank.compression.options import Run, Texts
from hf_lowrank.config import LowRankConfig, option
from hf_lowrank.errors import ConfigError
from hf_lowrank.inputs.sources import load_causal_lm
from hf_lowrank.inputs.start_token import start_text
from hf_lowrank.inputs.text import token_batches
from hf_lowrank.measuring.items import Batch
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.provenance import write_result

_PARTS = {"gradient": (0.0, 0.75), "held_out": (0.75, 1.0)}


@dataclass
class PerturbationArguments:
    """Arguments of the measurement of perturbation ranges."""

    model: str = option("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = option(None, "Sizes; default 0.8.")
    scales: list[float] | None = option(
        None, "Shares of the way to the truncation; default 0.003 0.01 0.03 0.1 0.3 1."
    )
    calibration: str = option("demo", "Calibration text; its last quarter is held out.")
    calibration_sequences: int = option(48, "Token windows for the moments and the gradient.")
    held_out_sequences: int = option(16, "Held-out token windows.")
    sequence_length: int = option(256, "Tokens in each window.")
    seed: int = option(0, "Seed of everything random.")
    dtype: str = option("float32", "Data type of the model; 16 bits round small noise away.")
    output: str = option("outputs/perturbation.json", "JSON file with the ranges.")
    picture: str = option("outputs/perturbation.svg", "SVG file with the ranges.")


def measure_perturbations(args: PerturbationArguments) -> None:
    """Measures each size on the gradient and the held-out set; prints, writes and draws.

    Raises:
        ConfigError: A size or a scale is out of range, or a size cuts nothing.
        DataError: The text is too short or unreadable, or the sets share an item.
    """
    ratios = args.param_ratio or [0.8]
    scales = args.scales or [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    configs = [LowRankConfig(param_ratio=r, seed=args.seed, form="factors") for r in ratios]
    for scale in scales:
        if not 0 < scale < math.inf:
            raise ConfigError(f"scales must be numbers > 0, got {scale!r}.")
    model, tokenizer = load_causal_lm(args.model, args.dtype)
    sets = _read_sets(args, tokenizer)
    check_disjoint(**sets)
    targets, run = find_targets(model, configs[0]), Run(Texts(sets["gradient"]))
    analysis = analyze(model, targets, configs[0], run, with_gradients=True)
    rows = measure_ranges(model, analysis, ratios, sets, scales)
    common = {"arguments": vars(args), "start_token": start_text(tokenizer)}
    write_result(Path(args.output), common | {"ranges": rows})
    try:
        draw_ranges(rows, Path(args.picture))
    except ConfigError as error:
        print(f"{args.picture} is left out: {error}")


def measure_ranges(
    model: nn.Module,
    analysis: Analysis,
    param_ratios: Sequence[float],
    sets: Mapping[str, Sequence[Batch]],
    scales: Sequence[float],
) -> list[dict[str, Any]]:
    """The range of each size on each set, printed as it comes.

    Args:
        model: The dense model; it is not changed.
        analysis: Of the model, with metric `kfac` and gradients.
        param_ratios: Kept shares of the targeted parameters.
        sets: Batches by the name of the set.
        scales: See `measure_range`.

    Returns:
        A row for each size and set: `param_ratio`, `kept` (the plan's own share), `set`,
        `predicted_rise` of the plan (nats), `points`, `linear_range` (relative weight noise) and
        `linear_scale` (the same as a share of the way to the truncation).

    Raises:
        ConfigError: A size is too small, or leaves every layer dense.
    """
    plans = [_cutting_plan(analysis, ratio) for ratio in param_ratios]
    rows = []
    for ratio, plan in zip(param_ratios, plans, strict=True):
        for name, batches in sets.items():
            points = measure_range(model, analysis, plan, batches, scales=scales)
            row = {"param_ratio": ratio, "kept": plan.param_ratio, "set": name}
            row |= {"predicted_rise": analysis.predicted_rise(plan)} | _summary(points)
            rows.append(row)
            print(f"## {range_title(row)}\n\n{format_range(points)}\n\n{_sentence(row)}\n")
    return rows


def _read_sets(
    args: PerturbationArguments,
    tokenizer: Any,  # noqa: ANN401
) -> dict[str, Sequence[Batch]]:
    sets: dict[str, Sequence[Batch]] = {}
    for name, part in _PARTS.items():
        role = "calibration" if name == "gradient" else name
        sets[name] = token_batches(
            args.calibration,
            tokenizer,
            sequences=getattr(args, f"{role}_sequences"),
            sequence_length=args.sequence_length,
            role=role,
            part=part,
        )
    return sets


def _cutting_plan(analysis: Analysis, param_ratio: float) -> RankPlan:
    plan = analysis.plan_for_ratio(param_ratio)
    if all(rank is None for rank in plan.ranks.values()):
        raise ConfigError(
            f"param_ratio {param_ratio} leaves every layer dense, so there is no noise to measure; "
            "give a smaller one."
        )
    return plan


def _summary(points: Sequence[PerturbationPoint]) -> dict[str, Any]:
    reached = linear_range(points)
    scale = max((point.scale for point in points if point.noise <= reached), default=0.0)
    return {
        "points": [asdict(point) for point in points],
        "linear_range": reached,
        "linear_scale": scale,
    }


def _sentence(row: Mapping[str, Any]) -> str:
    if not row["linear_scale"]:
        return "The first order holds at none of these points."
    return (
        f"The first order holds up to weight noise {row['linear_range']:.2e}, "
        f"{row['linear_scale']:.3g} of the way to the truncation."
    )

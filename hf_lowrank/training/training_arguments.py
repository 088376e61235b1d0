"""`LowRankTrainingArguments`: what low-rank training adds to `TrainingArguments`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from transformers import TrainingArguments

from hf_lowrank.config import LABEL_SOURCES, LowRankConfig, option
from hf_lowrank.errors import ConfigError
from hf_lowrank.training.penalties import RANK_PENALTIES
from hf_lowrank.value_checks import (
    check_between,
    check_choice,
    check_count,
    check_not_negative,
    check_positive,
)

SELECTION_RULES = ("price", "relative")
TOLERANCE_REFERENCES = ("start", "best", "current")
BREAK_EVEN_CHOICES = ("wait", "dense")
# Settings of a LowRankConfig: what training reads, and what takes the place of the others.
_READ = ("target_modules", "exclude_modules", "rank_pattern")
_READ_FOR_PRICES = ("input_damping", "output_damping")
_DECISIONS = ("ranks", "narrowed", "experts", "form", "format_version", "quant_method")
_INSTEAD = {
    "param_ratio": "target_param_ratio in LowRankTrainingArguments",
    "loss_tolerance": "selection_tolerance in LowRankTrainingArguments",
    "rank": "rank_pattern",
    "metric": "selection_rule in LowRankTrainingArguments",
    "rule": "selection_rule in LowRankTrainingArguments",
    "min_rank": "smallest_ratio in LowRankTrainingArguments",
    "input_damping": "selection_rule='price', which reads it",
    "output_damping": "selection_rule='price', which reads it",
    "label_source": "selection_labels in LowRankTrainingArguments",
    "seed": "seed in LowRankTrainingArguments",
}


@dataclass
class LowRankTrainingArguments(TrainingArguments):
    """Training arguments of `LowRankTrainer`.

    Raises:
        ConfigError: A value is out of range, or a distributed strategy is not supported.
    """

    orthogonality_weight: float = option(
        1.0, "lambda_O: weight of the penalty that keeps U and V orthonormal."
    )
    rank_penalty: str = option(
        "hoyer", "Penalty on the spectra: " + ", ".join(RANK_PENALTIES) + "."
    )
    rank_penalty_weight: float = option(1e-3, "lambda_R: weight of the penalty on the spectra.")
    selection_rule: str = option(
        "price",
        "Rule of the rank selection: price (predicted nats per parameter) or relative (the "
        "paper's).",
    )
    selection_tolerance: float = option(
        0.02, "epsilon: largest rise of the task loss that a selection may cause, nats."
    )
    target_param_ratio: float | None = option(
        None,
        "Cut to this share of the targeted parameters instead of to a tolerance: geometrically, "
        "over the selections of the first two thirds of the training.",
    )
    selection_samples: int = option(
        512, "Training examples that the selection is measured on: a fixed, seeded subset; 0 = all."
    )
    selection_labels: str = option(
        "model",
        "Labels of the curvature that rule price reads: model (sampled from its predictions: the "
        "Fisher information) or data (a model that fits its training set has hardly any gradient "
        "left there).",
    )
    selection_precision: float = option(0.01, "Bracket width at which the bisection stops.")
    selection_steps: int = option(
        0, "Select every this many steps; 0 selects at the end of every epoch."
    )
    tolerance_reference: str = option(
        "best",
        "Loss that the tolerance is measured from: start (the model before training; total drift "
        "at most epsilon), best (lowest loss so far; at most epsilon above it), or current (the "
        "model before this selection, as in the paper; the drift can add up to epsilon times the "
        "number of selections).",
    )
    break_even: str = option(
        "wait",
        "What becomes of a layer whose selected rank saves no parameters: wait (it trains on "
        "factorized, is considered again, and is exported dense if it never falls below), or dense "
        "(it is multiplied out at once and stays dense).",
    )
    smallest_ratio: float = option(
        0.02, "Smallest share of the targeted parameters that a selection may keep."
    )

    def __post_init__(self) -> None:
        """Checks the added fields and refuses what can't work."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in ("orthogonality_weight", "rank_penalty_weight"):
            check_not_negative(name, getattr(self, name))
        check_positive("selection_tolerance", self.selection_tolerance)
        check_between("selection_precision", self.selection_precision, "(0, 1)")
        if self.target_param_ratio is not None:
            check_between("target_param_ratio", self.target_param_ratio, "(0, 1]")
        check_between("smallest_ratio", self.smallest_ratio, "(0, 1]")
        for name in ("selection_samples", "selection_steps"):
            check_count(name, getattr(self, name), 0)
        for name, allowed in (
            ("rank_penalty", RANK_PENALTIES),
            ("selection_rule", SELECTION_RULES),
            ("selection_labels", LABEL_SOURCES),
            ("tolerance_reference", TOLERANCE_REFERENCES),
            ("break_even", BREAK_EVEN_CHOICES),
        ):
            check_choice(name, getattr(self, name), allowed)
        if self.deepspeed or self.fsdp:
            strategy = "DeepSpeed" if self.deepspeed else "FSDP"
            raise ConfigError(
                f"LowRankTrainer cuts parameters while it trains, which {strategy}'s sharded "
                "parameters do not allow; compress before `prepare` and train with Trainer, or use "
                "DDP."
            )


def check_lowrank_config(
    config: LowRankConfig, args: LowRankTrainingArguments, *, is_compressed: bool
) -> None:
    """Refuses settings of a `LowRankConfig` that training would ignore.

    Args:
        config: What `LowRankTrainer` is given.
        args: How it trains.
        is_compressed: Whether the model has low-rank layers. These keep their ranks, so the config
            may be the one that came with them, as a record, and chooses nothing.

    Raises:
        ConfigError: With the first such setting, and what to set instead.
    """
    if is_compressed and config.ranks is not None:
        return
    if config.ranks is not None:
        raise ConfigError(
            "LowRankTrainer starts a dense model at full rank and does not read ranks of its "
            "lowrank_config; fix ranks by rank_pattern."
        )
    read = {*_DECISIONS} | (set() if is_compressed else {*_READ})
    if args.selection_rule == "price":
        read |= {*_READ_FOR_PRICES}
    default = LowRankConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in read or value == getattr(default, field.name):
            continue
        if field.name in _READ:
            advice = "The model has low-rank layers already, and those are trained; leave it out."
        elif field.name in _INSTEAD:
            advice = f"Set {_INSTEAD[field.name]} instead."
        else:
            advice = "It is for compress; leave it out."
        raise ConfigError(
            f"LowRankTrainer would ignore {field.name}={value!r} of its lowrank_config. {advice}"
        )

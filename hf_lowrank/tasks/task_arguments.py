"""Arguments that runs on all tasks share."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields
from typing import Any

from hf_lowrank.config import LowRankConfig, config_option, option
from hf_lowrank.errors import ConfigError
from hf_lowrank.inputs.sources import TRUST_HELP
from hf_lowrank.value_checks import check_between, check_choice, check_count, check_read

# What the extra `tasks` installs, by the names that are imported.
_PACKAGES = ("evaluate", "scipy", "sklearn")
# Cut first, then fine-tune: the settings of each method; its rule is the metric's default.
CUTS: dict[str, dict[str, Any]] = {
    "svd": {"metric": "plain"},
    "fisher-rows": {"metric": "fisher-rows"},
    "activation-scale": {"metric": "activation-scale"},
    "whitened": {"metric": "whitened"},
    "kfac": {"metric": "kfac"},
    "kfac-channels": {"metric": "kfac", "channels": True},
}
# Cut while training: the rule of each method.
SELECTION_RULES = {"rank-selection": "relative", "rank-selection-price": "price"}
# Trained at full rank until the stable ranks settle, then cut: the metric of each method.
CUTTLEFISH_VARIANTS = {"cuttlefish": "plain", "cuttlefish-kfac": "kfac"}
# Pruned first: LPAF, and what it has in place of one of its parts.
LPAF_VARIANTS: dict[str, dict[str, Any]] = {
    "lpaf": {},
    "lpaf-no-pruning": {"prune": False},
    "lpaf-plain-svd": {"metric": "plain"},
    "lpaf-no-mixing": {"mixed_rank": False},
    "lpaf-kfac": {"metric": "kfac"},
    "lpaf-movement": {"criterion": "movement"},
    "lpaf-magnitude": {"criterion": "magnitude"},
}
PRUNING_STARTS = ("fine-tuned", "pre-trained")
# Part of the training set that chooses the best epoch.
HELD_OUT_SHARE = 0.1
# Cut along the gradient, with ranks and factors that held-out examples accept.
JOINT = "joint"
METHOD_NAMES = ("dense", *CUTS, JOINT, *SELECTION_RULES, *CUTTLEFISH_VARIANTS, *LPAF_VARIANTS)
_PRUNING = tuple(name for name, parts in LPAF_VARIANTS.items() if parts.get("prune", True))
# Methods that read a setting which others don't: with those it would do nothing, and is refused.
READERS: dict[str, tuple[str, ...]] = {
    "param_ratio": METHOD_NAMES[1:],
    "loss_tolerance": METHOD_NAMES[1:],
    "form": (*CUTS, JOINT, *CUTTLEFISH_VARIANTS, *LPAF_VARIANTS),
    "selection_samples": (*SELECTION_RULES,),
    "selections_per_epoch": (*SELECTION_RULES, *CUTTLEFISH_VARIANTS),
    "full_rank_share": (*CUTTLEFISH_VARIANTS,),
    "final_density": _PRUNING,
    "pruning_share": _PRUNING,
    "gate": _PRUNING,
    "pruning_start": _PRUNING,
}


@dataclass
class TaskArguments:
    """What a run on a task is made of; see `run_task`."""

    model: str = option("sentence-transformers/all-MiniLM-L6-v2", "Encoder: Hub id or folder.")
    trust_remote_code: bool = option(False, TRUST_HELP)
    task: str = option("task", "Name of the task.")
    method: str = option("kfac", "Method: " + ", ".join(METHOD_NAMES) + ".")
    param_ratio: float | None = option(None, "Goal: kept share of the encoder's linear parameters.")
    loss_tolerance: float | None = option(
        None, "Goal: largest rise of the loss on a held-out part of the training set, nats."
    )
    output_dir: str | None = option(None, "Folder for the model, report.json and the model card.")
    cache_dir: str = option(
        "outputs/dense", "Folder for dense fine-tuned models and their spectra."
    )
    dense_epochs: float = option(3, "Epochs of the dense fine-tuning that all methods share.")
    dense_learning_rate: float = option(1e-4, "Its learning rate.")
    epochs: float = option(3, "Epochs of fine-tuning with or after the cut; 0 for none.")
    steps: int = option(0, "Optimizer steps in place of epochs; 0: as many as the epochs have.")
    learning_rate: float = option(1e-4, "Its learning rate.")
    distillation_weight: float = option(
        0.0,
        "Share of the loss that is the divergence from the dense fine-tuned model's predictions.",
    )
    selections_per_epoch: int = option(
        2, "Rank selections in an epoch, where a method selects; profiles of Cuttlefish's ranks."
    )
    selection_samples: int = option(256, "Training examples that a selection is measured on.")
    final_density: float = option(0.25, "Share of the weights that survives LPAF's pruning.")
    pruning_share: float = option(
        0.5, "Share of the epochs or steps in which LPAF prunes; the others are of mixed rank."
    )
    pruning_start: str = option(
        "fine-tuned", "Model that LPAF prunes: " + " or ".join(PRUNING_STARTS) + "."
    )
    gate: float = option(
        0.95,
        "Share of the dense score on held-out training examples that LPAF's pruned model must keep "
        "to be factorized.",
    )
    full_rank_share: float = option(
        0.5, "Largest share of the epochs that Cuttlefish trains at full rank."
    )
    batch_size: int = option(32, "Examples in a training batch.")
    max_length: int = option(128, "Tokens to which an example is cut.")
    train_samples: int = option(0, "Training examples to use: a seeded subset; 0 = all.")
    calibration_samples: int = option(1536, "Training examples for the moments.")
    attention_dropout: float = option(
        0.0, "Dropout of the attention weights while training; above 0 it costs a third more time."
    )
    bf16: bool = option(True, "Train under bf16 autocast.")
    seed: int = option(0, "Seed of everything random.")
    form: str | None = config_option("form")

    def check_readers(self) -> None:
        """Refuses settings that the method does not read; a table's rows have those of all methods.

        Raises:
            ConfigError: With the first, and the methods that read it.
        """
        for field in fields(self):
            value, readers = getattr(self, field.name), READERS.get(field.name, METHOD_NAMES)
            if value != field.default:
                check_read(field.name, value, "method", self.method, readers)

    def check(self) -> None:
        """Refuses settings that are certain to fail.

        Raises:
            ConfigError: With the first such setting, or with the packages that are missing.
        """
        if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
            raise ConfigError(
                f"Tasks need {', '.join(missing)}, not installed: pip install 'hf-lowrank[tasks]'."
            )
        check_choice("method", self.method, METHOD_NAMES)
        LowRankConfig(
            param_ratio=self.param_ratio, loss_tolerance=self.loss_tolerance, seed=self.seed
        )
        while_training = {*SELECTION_RULES, *CUTTLEFISH_VARIANTS, *LPAF_VARIANTS}
        if self.method in while_training and self.epochs <= 0 and not self.steps:
            raise ConfigError(f"method {self.method} cuts while it trains; epochs must be > 0.")
        if self.method in SELECTION_RULES and self.distillation_weight > 0:
            raise ConfigError(
                f"method {self.method} trains without a teacher; set distillation_weight to 0."
            )
        check_choice("pruning_start", self.pruning_start, PRUNING_STARTS)
        if self.method in SELECTION_RULES and self.loss_tolerance == 0:
            raise ConfigError(f"method {self.method} needs a loss_tolerance > 0.")
        if self.method in CUTTLEFISH_VARIANTS and self.param_ratio is None:
            raise ConfigError(f"method {self.method} cuts to a size; give a param_ratio.")
        for name in ("pruning_share", "full_rank_share"):
            check_between(name, getattr(self, name), "(0, 1)")
        for name in ("distillation_weight", "gate"):
            check_between(name, getattr(self, name), "[0, 1]")
        check_between("final_density", self.final_density, "(0, 1]")
        check_count("steps", self.steps, 0)
        if self.steps == 1 and self.method in _PRUNING:
            raise ConfigError(
                f"method {self.method} prunes and then trains: set steps to 2 or more."
            )
        for name in ("batch_size", "max_length", "calibration_samples", "selections_per_epoch"):
            check_count(name, getattr(self, name))
        check_between("attention_dropout", self.attention_dropout, "[0, 1)")

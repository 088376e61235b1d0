"""`PruningArguments` and `MixedRankArguments`: what both stages add to `DistillationArguments`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.pruning.scores import CRITERIA
from hf_lowrank.training.distillation import DistillationArguments


def check_share(name: str, value: float, *, least: float = 0.0, open_end: bool = False) -> None:
    """Refuses a share outside `(least, 1]`, or `[least, 1)` with `open_end`.

    Raises:
        ConfigError: With the value and the interval.
    """
    is_inside = least <= value < 1 if open_end else least < value <= 1
    if not is_inside:
        interval = f"[{least:g}, 1)" if open_end else f"({least:g}, 1]"
        raise ConfigError(f"{name} must lie in {interval}, got {value}.")


@dataclass
class PruningArguments(DistillationArguments):
    """Training arguments of `PruningTrainer`.

    Raises:
        ConfigError: A value is out of range, or a setting does not go with pruning.
    """

    final_density: float = option(0.25, "v_f: share of the targeted weights that survives.")
    pruning_criterion: str = option(
        "sensitivity",
        "Which weights survive: sensitivity (mean of |w g| times its deviation), movement (trained "
        "scores) or magnitude.",
    )
    pruning_warmup: float = option(0.06, "Share of the steps at the start without pruning.")
    pruning_cooldown: float = option(0.3, "Share of the steps at the end at final_density.")
    mask_interval: int = option(10, "Optimizer steps between two choices of the survivors.")

    def __post_init__(self) -> None:
        """Checks the added fields and refuses what can't work."""
        super().__post_init__()
        check_share("final_density", self.final_density)
        check_share("pruning_warmup", self.pruning_warmup, open_end=True)
        check_share("pruning_cooldown", self.pruning_cooldown, open_end=True)
        if self.pruning_warmup + self.pruning_cooldown >= 1:
            raise ConfigError(
                f"pruning_warmup {self.pruning_warmup} and pruning_cooldown "
                f"{self.pruning_cooldown} leave no steps to prune in; lower one."
            )
        if self.pruning_criterion not in CRITERIA:
            raise ConfigError(
                f"pruning_criterion must be one of {', '.join(CRITERIA)}; got "
                f"{self.pruning_criterion!r}."
            )
        if self.mask_interval < 1:
            raise ConfigError(f"mask_interval must be >= 1, got {self.mask_interval}.")
        if self.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end would bring back a model from before the pruning ended; "
                "leave it off."
            )
        if self.fp16:
            raise ConfigError("fp16 scales the gradients that pruning scores read; use bf16.")
        if self.deepspeed or self.fsdp:
            raise ConfigError("Pruning reads whole weights, which FSDP and DeepSpeed shard.")


@dataclass
class MixedRankArguments(DistillationArguments):
    """Training arguments of `MixedRankTrainer`.

    Raises:
        ConfigError: A value is out of range, or a setting does not go with mixed ranks.
    """

    sparse_probability: float = option(
        0.5, "Chance at the start that a layer uses its sparse matrix in place of its factors."
    )
    mixed_share: float = option(0.6, "Share of the steps after which that chance is 0.")
    consistency_weight: float = option(
        1.0, "Weight of the divergence between two passes with independent choices."
    )

    def __post_init__(self) -> None:
        """Checks the added fields and refuses what can't work."""
        super().__post_init__()
        check_share("sparse_probability", self.sparse_probability, open_end=True)
        check_share("mixed_share", self.mixed_share)
        if not 0 <= self.consistency_weight < math.inf:
            raise ConfigError(
                f"consistency_weight must be a number >= 0, got {self.consistency_weight}."
            )
        if self.gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing repeats a forward pass later, when the choice of sparse "
                "matrices is another; leave it off."
            )
        if self.deepspeed or self.fsdp or self.world_size > 1:
            raise ConfigError("Mixed-rank fine-tuning runs in one process.")

"""`PruningArguments` and `MixedRankArguments`: what both stages add to `DistillationArguments`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.pruning.scores import CRITERIA
from hf_lowrank.training.distillation import DistillationArguments
from hf_lowrank.value_checks import check_between, check_choice, check_count, check_not_negative


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
        check_between("final_density", self.final_density, "(0, 1]")
        check_between("pruning_warmup", self.pruning_warmup, "[0, 1)")
        check_between("pruning_cooldown", self.pruning_cooldown, "[0, 1)")
        if self.pruning_warmup + self.pruning_cooldown >= 1:
            raise ConfigError(
                f"pruning_warmup {self.pruning_warmup} and pruning_cooldown "
                f"{self.pruning_cooldown} leave no steps to prune in; lower one."
            )
        check_choice("pruning_criterion", self.pruning_criterion, CRITERIA)
        check_count("mask_interval", self.mask_interval)
        if self.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end would bring back a model from before the pruning ended; "
                "leave it off."
            )
        if self.fp16:
            raise ConfigError("fp16 scales the gradients that pruning scores read; use bf16.")
        if self.deepspeed or self.fsdp:
            raise ConfigError(
                "Pruning reads whole weights, which FSDP and DeepSpeed shard; leave both off."
            )


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
        check_between("sparse_probability", self.sparse_probability, "[0, 1)")
        check_between("mixed_share", self.mixed_share, "(0, 1]")
        check_not_negative("consistency_weight", self.consistency_weight)
        if self.gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing repeats a forward pass later, when the choice of sparse "
                "matrices is another; leave it off."
            )
        if self.deepspeed or self.fsdp or self.world_size > 1:
            raise ConfigError(
                "Mixed-rank fine-tuning runs in one process; start one, without FSDP or DeepSpeed."
            )

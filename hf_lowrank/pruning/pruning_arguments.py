"""`PruningArguments` and `MixedRankArguments`: what both stages add to `TrainingArguments`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.pruning.scores import CRITERIA, SCOPES


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
class PruningArguments(TrainingArguments):
    """Training arguments of `PruningTrainer`.

    Raises:
        ConfigError: A value is out of range, or a setting does not go with pruning.
    """

    final_density: float = option(0.25, "v_f: share of the targeted weights that survives.")
    pruning_criterion: str = option(
        "movement",
        "Which weights survive: movement (first order, minus the sum of gradient times weight) or "
        "magnitude (zero order).",
    )
    pruning_scope: str = option(
        "layer", "Whether the share holds in each layer, or over all layers together: global."
    )
    pruning_warmup: float = option(0.1, "Share of the steps at the start without pruning.")
    pruning_cooldown: float = option(0.3, "Share of the steps at the end at final_density.")
    mask_interval: int = option(10, "Optimizer steps between two choices of the survivors.")

    def __post_init__(self) -> None:
        """Checks the added fields and refuses what can't work."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_share("final_density", self.final_density)
        check_share("pruning_warmup", self.pruning_warmup, open_end=True)
        check_share("pruning_cooldown", self.pruning_cooldown, open_end=True)
        if self.pruning_warmup + self.pruning_cooldown >= 1:
            raise ConfigError(
                f"pruning_warmup {self.pruning_warmup} and pruning_cooldown "
                f"{self.pruning_cooldown} leave no steps to prune in; lower one."
            )
        for name, allowed in (("pruning_criterion", CRITERIA), ("pruning_scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}."
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
class MixedRankArguments(TrainingArguments):
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
    distillation_weight: float = option(
        0.0, "w: the task loss counts 1 - w, the divergence from a dense teacher w."
    )

    def __post_init__(self) -> None:
        """Checks the added fields and refuses what can't work."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_share("sparse_probability", self.sparse_probability, open_end=True)
        check_share("mixed_share", self.mixed_share)
        if not 0 <= self.consistency_weight < math.inf:
            raise ConfigError(
                f"consistency_weight must be a number >= 0, got {self.consistency_weight}."
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ConfigError(
                f"distillation_weight must lie in [0, 1], got {self.distillation_weight}."
            )
        if self.gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing repeats a forward pass later, when the choice of sparse "
                "matrices is another; leave it off."
            )
        if self.deepspeed or self.fsdp or self.world_size > 1:
            raise ConfigError("Mixed-rank fine-tuning runs in one process.")

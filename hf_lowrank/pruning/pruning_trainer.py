"""`PruningTrainer`: fine-tuning that prunes a model's linear layers weight by weight."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import CheckpointError, ConfigError
from hf_lowrank.files import atomic_file
from hf_lowrank.modeling.qualification import qualified
from hf_lowrank.pruning.lpaf_report import PruningOverhead
from hf_lowrank.pruning.masked import MaskedWeights
from hf_lowrank.pruning.pruning_arguments import PruningArguments
from hf_lowrank.pruning.schedule import density_at
from hf_lowrank.pruning.scores import SCORE_RATE, Movement
from hf_lowrank.training.distillation import DistillingTrainer

STATE_FILE = "pruning_state.safetensors"


class PruningTrainer(DistillingTrainer):
    """Prunes the target layers while the model trains, down to `final_density`.

    Every `mask_interval` optimizer steps the survivors are chosen anew, by one threshold over all
    layers and scores that the gradients of every step have entered; a dropped weight keeps
    training and may come back. Gradients enter as the optimizer sees them: averaged over
    accumulated batches, and clipped. The model always computes with the masked weights, and ends
    with them. Everything else is `DistillingTrainer`; a checkpoint also holds the dense weights,
    scores and masks.

    Args:
        model: Dense transformers model; changed in place.
        args: See `PruningArguments`.
        lowrank_config: Which layers; by default all linear layers inside the transformer blocks.
        **kwargs: As for `DistillingTrainer`.

    Attributes:
        weights: Masks and scores; see `MaskedWeights`.
        seconds: Time spent on pruning so far in this process.

    Raises:
        ConfigError: The arguments are of the wrong class.
        TargetError: See `qualified`.
    """

    args: PruningArguments

    def __init__(
        self,
        model: nn.Module,
        args: PruningArguments,
        *,
        lowrank_config: LowRankConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, PruningArguments):
            raise ConfigError(f"PruningTrainer needs PruningArguments, got {type(args).__name__}.")
        targets = qualified(model, lowrank_config or LowRankConfig()).targets
        super().__init__(model, args, **kwargs)
        parameters = {name: cast(nn.Parameter, layer.weight) for name, layer in targets.items()}
        self.weights = MaskedWeights(parameters, args.pruning_criterion)
        self.seconds = 0.0
        self.add_callback(_PruningCallback(self))

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Trainer's, with the scores of movement pruning at a rate of their own."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args)
        if is_new and isinstance(self.weights.criterion, Movement):
            scores = list(self.weights.criterion.state["scores"].values())
            optimizer.add_param_group({"params": scores, "lr": SCORE_RATE, "weight_decay": 0.0})
        return optimizer

    def before_optimizer_step(self) -> None:
        """Adds the gradients to the scores and hands the dense weights to the optimizer."""
        start = time.perf_counter()
        self.weights.before_step_()
        self.seconds += time.perf_counter() - start

    def after_optimizer_step(self) -> None:
        """Masks the weights again; the masks are renewed when they are due."""
        start = time.perf_counter()
        step = self.state.global_step + 1  # Trainer counts the step afterwards
        self.weights.after_step_(self._due_density(step))
        self.seconds += time.perf_counter() - start

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the share of weights that survive."""
        if "loss" in logs:
            logs["density"] = self.weights.density
        super().log(logs, start_time)

    def overhead(self) -> PruningOverhead:
        """What pruning cost in this process."""
        return PruningOverhead(self.weights.num_bytes, self.seconds)

    def _due_density(self, step: int) -> float | None:
        """The density for a new choice of survivors, None where none is due."""
        args = self.args
        density, before = (
            density_at(
                at,
                self.state.max_steps,
                args.final_density,
                args.pruning_warmup,
                args.pruning_cooldown,
            )
            for at in (step, step - 1)
        )
        arrives = density <= args.final_density < before
        return density if step % args.mask_interval == 0 or arrives else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model, and into a checkpoint the state of the pruning as well."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:
            with atomic_file(Path(output_dir or str(self.args.output_dir)) / STATE_FILE) as path:
                save_file({n: t.cpu().contiguous() for n, t in self.weights.state().items()}, path)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Reads the model and the state of the pruning."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / STATE_FILE
        try:
            self.weights.load_state_(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: can't be read ({error}); resume from a checkpoint of PruningTrainer."
            ) from error


class _PruningCallback(TrainerCallback):
    """Calls the trainer around each optimizer step."""

    def __init__(self, trainer: PruningTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.before_optimizer_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.after_optimizer_step()

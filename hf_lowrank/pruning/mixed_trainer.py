"""`MixedRankTrainer`: fine-tuning that leads from the sparse matrices over to their factors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import ConfigError
from hf_lowrank.pruning.consistency import check_comparable, divergence
from hf_lowrank.pruning.mixed_rank import draw_gates_, mix_, mixed_layers, unmix_
from hf_lowrank.pruning.pruning_arguments import MixedRankArguments
from hf_lowrank.pruning.schedule import sparse_probability
from hf_lowrank.training.base import CheckedTrainer

_PHASES = ("mixed", "plain")


class MixedRankTrainer(CheckedTrainer):
    """Trains a compressed model whose layers use their sparse matrices with a falling chance p.

    While p > 0 each batch passes twice, with independent choices for every layer:

        L = (1 - w) (L_1 + L_2) / 2 + weight (KL_12 + KL_21) / 2 + w (T_1 + T_2) / 2,

    where T is the divergence from a teacher and w its weight. From the step on at which p is 0 a
    batch passes once, through factors alone, without the second term; the sparse matrices are
    freed. A run that is broken off keeps its sparse matrices until `unmix_` or a longer run.

    Args:
        model: The compressed model; changed in place.
        args: See `MixedRankArguments`.
        sparse_layers: The pruned dense layers that were factorized, by name; their weights are
            used as they are and not trained. Empty for plain fine-tuning.
        teacher: Dense fine-tuned model for the distillation.
        **kwargs: As for `Trainer`.

    Attributes:
        sparse_bytes: Memory of the sparse matrices while they are held.
        seconds: Time of the training steps in this process, "mixed" and "plain".
        steps: Their number (forward and backward passes over a batch).

    Raises:
        ConfigError: The arguments are of the wrong class, do not fit together, or the model's
            predictions can't be compared.
        TargetError: See `mix_`.
    """

    args: MixedRankArguments

    def __init__(
        self,
        model: nn.Module,
        args: MixedRankArguments,
        *,
        sparse_layers: Mapping[str, nn.Module] | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MixedRankArguments):
            raise ConfigError(
                f"MixedRankTrainer needs MixedRankArguments, got {type(args).__name__}."
            )
        if args.distillation_weight > 0 and teacher is None:
            raise ConfigError("distillation_weight needs a teacher; pass one or set it to 0.")
        if sparse_layers or args.distillation_weight > 0:
            check_comparable(model)
        layers = mix_(model, sparse_layers or {})
        self.sparse_bytes = sum(m.sparse.numel() * m.sparse.element_size() for m in layers.values())
        self.seconds = dict.fromkeys(_PHASES, 0.0)
        self.steps = dict.fromkeys(_PHASES, 0)
        self.teacher = teacher if args.distillation_weight > 0 else None
        super().__init__(model, args=args, **kwargs)
        if self.teacher is not None:
            self.teacher.to(self.args.device).eval()
        self.add_callback(_MixedRankCallback(self))

    @property
    def probability(self) -> float:
        """Chance that a layer uses its sparse matrix in the step that is due."""
        step, args = self.state.global_step, self.args
        return sparse_probability(
            step, self.state.max_steps, args.sparse_probability, args.mixed_share
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """The loss of the class docstring in training, the task loss alone in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        layers = mixed_layers(self.model)
        passes = []
        for _ in range(2 if layers else 1):
            draw_gates_(layers, self.probability)
            passes.append(super().compute_loss(model, dict(inputs), True, num_items_in_batch))
        task = torch.stack([loss for loss, _ in passes]).mean()
        outputs = [output for _, output in passes]
        share = self.penalty_share(num_items_in_batch)
        weight = self.args.distillation_weight
        total = (1 - weight) * task
        if len(outputs) == 2:
            apart = divergence(self.model, inputs, *outputs, symmetric=True)
            total = total + share * self.args.consistency_weight * apart
        if self.teacher is not None:
            with torch.no_grad():
                goal = self.teacher(**inputs)
            apart = torch.stack([divergence(self.model, inputs, goal, o) for o in outputs]).mean()
            total = total + share * weight * apart
        return (total, outputs[0]) if return_outputs else total

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One step, its time counted towards its phase."""
        phase = _PHASES[0] if mixed_layers(self.model) else _PHASES[1]
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seconds[phase] += time.perf_counter() - start
        self.steps[phase] += 1
        return loss

    def free_sparse(self) -> None:
        """Frees the sparse matrices once their chance is 0; called before every step."""
        if self.probability <= 0:
            unmix_(self.model)

    def overhead(self) -> dict[str, float | None]:
        """Bytes held by the sparse matrices, and mean seconds of a step of either phase."""
        means = {
            f"{phase}_step_seconds": self.seconds[phase] / n if (n := self.steps[phase]) else None
            for phase in _PHASES
        }
        return {"sparse_bytes": self.sparse_bytes, **means}


class _MixedRankCallback(TrainerCallback):
    """Frees the sparse matrices at the step at which they are needed no more, or at the end."""

    def __init__(self, trainer: MixedRankTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.free_sparse()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        unmix_(self.trainer.model)

"""`MixedRankTrainer`: fine-tuning that leads from the sparse matrices over to their factors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import ConfigError
from hf_lowrank.pruning.lpaf_report import MixingOverhead
from hf_lowrank.pruning.mixed_rank import draw_gates_, mix_, mixed_layers, unmix_
from hf_lowrank.pruning.pruning_arguments import MixedRankArguments
from hf_lowrank.pruning.schedule import sparse_probability
from hf_lowrank.training.distillation import DistillingTrainer, Pass
from hf_lowrank.training.divergence import check_comparable, divergence

_PHASES = ("mixed", "plain")


class MixedRankTrainer(DistillingTrainer):
    """Trains a compressed model whose layers use their sparse matrices with a falling chance p.

    While p > 0 each batch passes twice, with independent choices for every layer:

        L = (1 - w) (L_1 + L_2) / 2 + weight (KL_12 + KL_21) / 2 + w (T_1 + T_2) / 2,

    where T_i is the divergence from a teacher and w its weight, see `DistillingTrainer`. From the
    step on at which p is 0 a batch passes once, through factors alone, without the second term;
    the sparse matrices are freed. A run that is broken off keeps its sparse matrices until
    `unmix_` or a longer run.

    Args:
        model: The compressed model; changed in place.
        args: See `MixedRankArguments`.
        sparse_layers: The pruned dense layers that were factorized, by name; their weights are
            used as they are and not trained. Empty for plain fine-tuning.
        **kwargs: As for `DistillingTrainer`.

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
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MixedRankArguments):
            raise ConfigError(
                f"MixedRankTrainer needs MixedRankArguments, got {type(args).__name__}."
            )
        super().__init__(model, args, **kwargs)
        if sparse_layers:
            check_comparable(model)
        layers = mix_(model, sparse_layers or {})
        self.sparse_bytes = sum(m.sparse.numel() * m.sparse.element_size() for m in layers.values())
        self.seconds = dict.fromkeys(_PHASES, 0.0)
        self.steps = dict.fromkeys(_PHASES, 0)
        self.add_callback(_MixedRankCallback(self))

    @property
    def probability(self) -> float:
        """Chance that a layer uses its sparse matrix in the step that is due."""
        step, args = self.state.global_step, self.args
        return sparse_probability(
            step, self.state.max_steps, args.sparse_probability, args.mixed_share
        )

    def passes(
        self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> list[Pass]:
        """Two with independent choices while sparse matrices are held, in training; else one."""
        layers = mixed_layers(self.model) if model.training else {}
        found = []
        for _ in range(2 if layers else 1):
            draw_gates_(layers, self.probability)
            found += super().passes(model, inputs, num_items)
        return found

    def penalty(self, inputs: dict[str, Any], outputs: list[Any]) -> torch.Tensor:
        """The teacher's share, and the divergence of two passes."""
        total = super().penalty(inputs, outputs)
        if len(outputs) == 2:
            apart = divergence(self.model, inputs, *outputs, symmetric=True)
            total = total + self.args.consistency_weight * apart
        return total

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

    def free_sparse_(self) -> None:
        """Frees the sparse matrices once their chance is 0; called before every step."""
        if self.probability <= 0:
            unmix_(self.model)

    def overhead(self) -> MixingOverhead:
        """Bytes held by the sparse matrices, and mean seconds of a step of either phase."""
        means = (self.seconds[p] / n if (n := self.steps[p]) else None for p in _PHASES)
        return MixingOverhead(self.sparse_bytes, *means)


class _MixedRankCallback(TrainerCallback):
    """Frees the sparse matrices at the step at which they are needed no more, or at the end."""

    def __init__(self, trainer: MixedRankTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.free_sparse_()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        unmix_(self.trainer.model)

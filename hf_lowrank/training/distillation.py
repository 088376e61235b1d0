"""`DistillingTrainer`: fine-tuning whose loss also sees what a dense teacher predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainingArguments

from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.training.base import CheckedTrainer
from hf_lowrank.training.divergence import check_comparable, divergence
from hf_lowrank.value_checks import check_between, check_positive

# A pass of a batch through the model: its task loss and its output.
Pass = tuple[torch.Tensor, Any]


@dataclass
class DistillationArguments(TrainingArguments):
    """Training arguments of `DistillingTrainer`.

    Raises:
        ConfigError: A value is out of range.
    """

    distillation_weight: float = option(
        0.0, "w: the task loss counts 1 - w, the divergence from a dense teacher w."
    )
    distillation_temperature: float = option(2.0, "T: logits are divided by it before they meet.")

    def __post_init__(self) -> None:
        """Checks the added fields."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_between("distillation_weight", self.distillation_weight, "[0, 1]")
        check_positive("distillation_temperature", self.distillation_temperature)


def check_teacher(model: nn.Module, args: DistillationArguments, teacher: nn.Module | None) -> None:
    """Refuses a distillation without a teacher, or of predictions that can't be compared.

    Raises:
        ConfigError: With what is wrong.
    """
    if args.distillation_weight > 0:
        if teacher is None or teacher is model:
            raise ConfigError(
                "distillation_weight needs a teacher that is not the model itself; pass one or set "
                "it to 0."
            )
        check_comparable(model)


class DistillingTrainer(CheckedTrainer):
    """A trainer with the loss `(1 - w) task + w T^2 KL(teacher || model)` at a temperature T.

    Evaluation measures the same loss, so that the best model is the best in what is trained for;
    with w = 0 both are the task's. For other tasks than classes see `divergence`.

    Args:
        model: The model to train.
        args: See `DistillationArguments`.
        teacher: Dense fine-tuned model; used where w > 0.
        **kwargs: As for `Trainer`.

    Raises:
        ConfigError: w > 0 without a teacher, or predictions that can't be compared.
    """

    args: DistillationArguments

    def __init__(
        self,
        model: nn.Module,
        args: DistillationArguments,
        *,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        check_teacher(model, args, teacher)
        super().__init__(model, args=args, **kwargs)
        self.teacher = teacher if args.distillation_weight > 0 else None
        if self.teacher is not None:
            self.teacher.to(self.args.device).eval()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """The loss of the class docstring, a mean over the batch's passes."""
        passes = self.passes(model, inputs, num_items_in_batch)
        task = torch.stack([loss for loss, _ in passes]).mean()
        share = self.penalty_share(num_items_in_batch) if model.training else 1.0
        outputs = [output for _, output in passes]
        total = (1 - self.args.distillation_weight) * task + share * self.penalty(inputs, outputs)
        return (total, outputs[0]) if return_outputs else total

    def passes(
        self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> list[Pass]:
        """Task losses and outputs of a batch: one here."""
        loss, outputs = super().compute_loss(model, dict(inputs), True, num_items)
        return [(cast("torch.Tensor", loss), outputs)]

    def penalty(self, inputs: dict[str, Any], outputs: list[Any]) -> torch.Tensor:
        """What is added to the task's share of the loss: the teacher's, a scalar in fp32."""
        if self.teacher is None:
            return torch.zeros((), device=self.args.device)
        with torch.no_grad():
            goal = self.teacher(**inputs)
        T = self.args.distillation_temperature
        apart = [divergence(self.model, inputs, goal, found, temperature=T) for found in outputs]
        return self.args.distillation_weight * torch.stack(apart).mean()

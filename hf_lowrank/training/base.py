"""`CheckedTrainer`: what all trainers of this library need beyond `Trainer`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer

from hf_lowrank.errors import NumericalError
from hf_lowrank.measuring.items import is_causal_lm


class CheckedTrainer(Trainer):
    """A `Trainer` that stops at a loss that is no number and scales accumulated losses rightly.

    Args:
        model: Transformers model.
        **kwargs: As for `Trainer`.
    """

    model: nn.Module
    advice: ClassVar[str] = "Lower the learning rate."

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        if not is_causal_lm(model):
            # Encoders' heads take **kwargs but do not normalise their loss by num_items_in_batch.
            self.model_accepts_loss_kwargs = False

    def penalty_share(self, num_items_in_batch: torch.Tensor | int | None) -> float:
        """Factor for terms added to the task loss, so that accumulated steps add up to their mean.

        It is 1 where Trainer divides the sum of both by the accumulation steps afterwards.
        """
        said = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.0 does not have it
        if said is not None:
            is_scaled = bool(said)
        else:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = bool(by_items or self.compute_loss_func is not None)
        return 1.0 / float(self.current_gradient_accumulation_steps) if is_scaled else 1.0

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One step as in `Trainer`.

        Raises:
            NumericalError: The loss is NaN or infinite.
        """
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"The training loss is {float(loss)} at step {self.state.global_step + 1}; the "
                f"last checkpoint in {self.args.output_dir} is as it was. {self.advice}"
            )
        return loss

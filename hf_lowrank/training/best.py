"""`BestWeights`: the weights with the lowest held-out loss, kept in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class BestWeights(TrainerCallback):
    """Keeps a copy of the weights at the evaluation with the lowest loss.

    With `eval_on_start` the start counts as well, so training never makes the held-out loss worse.

    Args:
        model: The model that is trained.
        counts: Whether the model as it is now may be kept: a model that is still to be cut may not.

    Attributes:
        best_loss: Lowest evaluation loss so far.
    """

    def __init__(self, model: nn.Module, counts: Callable[[], bool] = lambda: True) -> None:
        self.model = model
        self.counts = counts
        self.best_loss = math.inf
        self._weights: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies the weights if this evaluation is the best so far."""
        loss = float(kwargs["metrics"]["eval_loss"])
        if loss < self.best_loss and self.counts():
            self.best_loss = loss
            self._weights = {name: t.clone() for name, t in self.model.state_dict().items()}

    def restore_(self) -> None:
        """Puts the best weights back, if any evaluation took place."""
        if self._weights:
            self.model.load_state_dict(self._weights)

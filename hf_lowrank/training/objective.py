"""`ObjectiveTrainer`: training by a loss that is measured item by item, embeddings included."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers.utils import find_labels

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.format.rebuild import compressed_layers
from hf_lowrank.measuring.batches import checked_batches
from hf_lowrank.measuring.embeddings import EmbeddingLoss, has_no_head, with_embeddings
from hf_lowrank.measuring.items import Batch, ItemLosses, LossFunction, inner_model
from hf_lowrank.training.base import CheckedTrainer

_LABELS = ("labels", "label", "label_ids")


def objective_of(
    model: nn.Module, loss_function: LossFunction | None, compute_loss_func: object
) -> LossFunction | None:
    """The loss to train by: as given, or for a model without head and labels its embedding's.

    Returns:
        None for the model's own loss, or what Trainer's `compute_loss_func` makes of its outputs.

    Raises:
        ConfigError: Both are given.
    """
    if loss_function is not None and compute_loss_func is not None:
        raise ConfigError(
            "loss_function and compute_loss_func are two losses; give the one to train by."
        )
    has_own = compute_loss_func is not None or find_labels(type(inner_model(model)))
    if loss_function is None and not has_own and has_no_head(model):
        return EmbeddingLoss()
    return loss_function


def teacher_for(
    model: nn.Module,
    objective: LossFunction | None,
    teacher: nn.Module | None,
    rows: Any,  # noqa: ANN401
) -> nn.Module | None:
    """Who gives the embeddings to train towards: a copy of the dense model, unless one is given.

    Args:
        model: The model before any of its layers is changed.
        objective: From `objective_of`.
        teacher: As given.
        rows: The training set; where its rows have labels, these are the goal.

    Returns:
        None where nothing is asked of a teacher.

    Raises:
        ConfigError: The teacher has nothing to teach, or there is nothing to train towards.
    """
    if not isinstance(objective, EmbeddingLoss):
        if teacher is not None:
            raise ConfigError(
                f"{type(model).__name__}: a teacher gives embeddings to train towards, and this "
                "training has another loss; leave the teacher out, or pass "
                "loss_function=EmbeddingLoss()."
            )
        return None
    if teacher is not None or any(name in rows[0] for name in _LABELS):
        if teacher is model:
            raise ConfigError(
                "The teacher can't be the model itself, which changes; copy it first."
            )
        return teacher
    if compressed_layers(model):
        raise ConfigError(
            f"{type(model).__name__}: is compressed already, so its own embeddings are no goal; "
            "pass the dense model as teacher, or its embeddings as 'labels' of the training set."
        )
    return copy.deepcopy(model)


class ObjectiveTrainer(CheckedTrainer):
    """A trainer whose loss may be a `LossFunction`, by which its ranks can be selected as well.

    Evaluation measures the same loss, and hands out the items' losses as predictions.

    Args:
        model: Transformers model.
        loss_function: Loss of a batch, item by item; None for Trainer's.
        teacher: Where that is an `EmbeddingLoss`: gives the goal of batches without labels.
        **kwargs: As for `Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_function: LossFunction | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, **kwargs)
        self.loss_function = loss_function
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        if loss_function is not None:
            self.model_accepts_loss_kwargs = False  # a batch's mean is its own
        if self.measured is not None:
            self.can_return_loss = True  # of batches without labels, too
        if isinstance(loss_function, EmbeddingLoss):
            self.label_names = ["labels"]

    @property
    def measured(self) -> LossFunction | None:
        """The loss to measure items by; None for that of the model's head.

        Of a model without one, Trainer's loss of a whole batch stands for its items.
        """
        if self.loss_function is None and has_no_head(self.model):
            return self._loss_of_batch
        return self.loss_function

    def _loss_of_batch(self, model: nn.Module, batch: Batch) -> ItemLosses:
        loss = cast(torch.Tensor, super().compute_loss(model, dict(batch)))
        size = torch.tensor([len(next(iter(batch.values())))], device=loss.device)
        return ItemLosses(loss.float().reshape(1) * size, size)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """The mean of the items' losses, or Trainer's loss."""
        if self.loss_function is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = self.loss_function(model, inputs)
        loss = found.sums.sum() / found.counts.sum().clamp_min(1)
        return (loss, {"losses": found.sums / found.counts}) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One step towards the goal of its batch."""
        return super().training_step(model, dict(self._aimed([inputs])[0]), num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """One step of an evaluation, against the goal of its batch."""
        return super().prediction_step(model, dict(self._aimed([inputs])[0]), *args, **kwargs)

    def _aimed(self, batches: list[Batch]) -> list[Batch]:
        """The batches, with the teacher's embeddings as labels where they have none.

        Raises:
            DataError: Nobody knows them.
        """
        if not isinstance(self.loss_function, EmbeddingLoss):
            return batches
        if self.teacher is not None:
            return with_embeddings(self.teacher, batches, self.loss_function)
        if any("labels" not in batch for batch in batches):
            raise DataError(
                "The training set has embeddings as labels, and these rows have none; add them, or "
                "pass a teacher."
            )
        return batches

    def fixed_batches(self, role: str, count: int) -> list[Batch]:
        """A fixed, seeded subset of the training set, with what its loss is measured against.

        Examples of like length stand together, so that little of a batch is padding.

        Args:
            role: What it is for, in messages.
            count: How many examples; 0 for all.
        """
        data = cast(Any, self.train_dataset)
        wanted = min(count or len(data), len(data))
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen = sorted(torch.randperm(len(data), generator=generator)[:wanted].tolist())
        chosen.sort(key=lambda index: len(data[index].get("input_ids", ())))
        loader = DataLoader(
            Subset(data, chosen),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
        )
        tensors = ({k: v for k, v in b.items() if isinstance(v, torch.Tensor)} for b in loader)
        own_loss = self.measured is None or isinstance(self.measured, EmbeddingLoss)
        return self._aimed(checked_batches(tensors, role, self.model, own_loss=own_loss))

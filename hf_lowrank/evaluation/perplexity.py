"""Mean loss and perplexity of a language model over batches of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.measuring.passes import each_batch

ItemLoss = tuple[float, int]


@dataclass(frozen=True)
class LossMeasurement:
    """Losses of a model on some batches.

    Attributes:
        items: (loss summed over scored positions in nats, scored positions) of each sequence.
    """

    items: tuple[ItemLoss, ...]

    @property
    def positions(self) -> int:
        """Scored positions: tokens of a language model, or sentences."""
        return sum(count for _, count in self.items)

    @property
    def mean(self) -> float:
        """Mean loss, nats per scored position."""
        return sum(total for total, _ in self.items) / self.positions

    @property
    def perplexity(self) -> float:
        """exp(mean loss); infinity where that overflows."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def iterate_losses(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    loss_function: LossFunction | None = None,
    progress: str | None = None,
) -> Iterator[ItemLoss]:
    """Loss of each item, batch by batch, in eval mode; stop reading to stop early.

    Args:
        model: Model with its task head.
        batches: Forward inputs.
        loss_function: Loss of a batch; by default the model's own task loss.
        progress: Name of the phase for `track`, or None to show nothing.

    Raises:
        NumericalError: A loss is NaN or infinite: that is a failure, never a skipped batch.
    """
    results = each_batch(model, batches, loss_function or item_losses, progress)
    for index, result in enumerate(results):
        if not bool(torch.isfinite(result.sums).all()):
            raise NumericalError(
                f"The loss of batch {index} is NaN or infinite; load the model in float32, or in "
                "bfloat16 in place of float16."
            )
        yield from zip(result.sums.tolist(), result.counts.tolist(), strict=True)


def measure_loss(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    loss_function: LossFunction | None = None,
    progress: str | None = None,
) -> LossMeasurement:
    """Losses of a model on all batches; see `iterate_losses`.

    Raises:
        DataError: There is nothing to score.
        NumericalError: A loss is NaN or infinite.
    """
    items = iterate_losses(model, batches, loss_function=loss_function, progress=progress)
    result = LossMeasurement(tuple(items))
    if not result.items or not result.positions:
        raise DataError(
            "The evaluation data holds nothing to score; pass texts of two tokens or more, "
            "or labels that are not all -100."
        )
    return result

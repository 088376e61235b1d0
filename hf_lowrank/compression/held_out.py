"""Losses on held-out batches: what decides between plans and candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

from torch import nn

from hf_lowrank.channels.expert_order import Orders
from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.perplexity import LossMeasurement, iterate_losses, measure_loss
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.modeling.surgery import factorized
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.tolerance import LossDifference, paired_difference


class HeldOutLoss:
    """Measures plans on one set of batches, against the dense model.

    Args:
        model: The dense model; it is dense again after every measurement.
        batches: Held-out batches; all measurements are paired over their items.
        loss_function: Loss of a batch; by default the model's own task loss.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss_function: LossFunction | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.batches = batches
        self.loss_function = loss_function
        self.progress = progress

    @cached_property
    def dense(self) -> LossMeasurement:
        """Losses of the dense model, measured once."""
        return measure_loss(
            self.model,
            self.batches,
            loss_function=self.loss_function,
            progress="held-out data, dense" if self.progress else None,
        )

    def difference(
        self,
        factors: Mapping[str, Factors],
        plan: RankPlan,
        stop_above: float = math.inf,
        orders: Orders | None = None,
    ) -> LossDifference:
        """Rise of the mean loss under a plan; stops early once it is clearly above a limit.

        Raises:
            NumericalError: A loss is NaN or infinite.
        """
        label = f"held-out data, ratio {plan.param_ratio:.3f}"
        return self.compare(factorized(self.model, factors, plan, orders), stop_above, label)

    def compare(
        self,
        edited: AbstractContextManager[nn.Module],
        stop_above: float = math.inf,
        label: str = "held-out data",
    ) -> LossDifference:
        """Rise of the mean loss inside a context in which the model is another."""
        reference = self.dense.items
        with edited:
            losses = iterate_losses(
                self.model,
                self.batches,
                loss_function=self.loss_function,
                progress=label if self.progress else None,
            )
            return paired_difference(reference, losses, stop_above=stop_above)


def check_fixed_ranks(
    held_out: HeldOutLoss,
    factors: Mapping[str, Factors],
    largest: RankPlan,
    tolerance: float,
) -> None:
    """Refuses a tolerance that even the largest plan exceeds, where ranks are fixed by hand.

    Raises:
        ConfigError: With the measured rise.
    """
    if any(rank is not None for rank in largest.ranks.values()):
        rise = held_out.difference(factors, largest, tolerance)
        if rise.mean > tolerance:
            raise ConfigError(
                f"The ranks fixed by rank_pattern alone raise the held-out loss by "
                f"{rise.mean:.4f} nats, more than loss_tolerance {tolerance}; raise either."
            )

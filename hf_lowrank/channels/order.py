"""Channels with a price: what a feed-forward loses with fewer channels, in the `kfac` metric.

Removing channels of `y = W_out h` and rebuilding them from those kept, `h ~ T h_S`, changes the
weight by `D = W_out (T I_S - I)`, and the loss by `tr(G D C D^T)` times the price scale, as a
truncation does (docs/methods.md, section 1), with C the channels' second moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_lowrank.channels.narrowing import Narrowing, channel_weights, pseudo_solved, refit
from hf_lowrank.decomposition.metrics import QuadraticForm
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.decomposition.spectrum import check_finite, damped
from hf_lowrank.errors import NumericalError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.feed_forward import FeedForward

_ROUNDS = 48
_COLUMNS = 1024
_JITTER = 1e-6
_TINY = 1e-30
# Damping of the refit as a multiple of that of the price: a fit of hundreds of channels to few
# tokens wants more (docs/LOG.md).
REFIT = 10


@dataclass(frozen=True)
class ChannelOrder:
    """A feed-forward's channels, those to keep first.

    Attributes:
        block: Names of its layers.
        order: Indices, shape (n,), on the CPU as all tensors here.
        counts: How many are kept at each step, ascending to n.
        rises: Predicted rise of the mean loss at each step, nats, shape (steps,), fp64.
        moment: Their second moment, damped for the refit, shape (n, n), fp32.
    """

    block: FeedForward
    order: torch.Tensor
    counts: list[int]
    rises: torch.Tensor
    moment: torch.Tensor

    def predicted_rise(self, count: int) -> float:
        """Predicted rise of the mean loss with the first channels alone, nats.

        Between two steps that of the smaller one; below the first step NaN.
        """
        steps = sum(each <= count for each in self.counts)
        return float(self.rises[steps - 1]) if steps else math.nan

    def narrowing(self, model: nn.Module, count: int) -> Narrowing:
        """The first channels of a dense model's block, and an output weight fitted to them."""
        weights = channel_weights(model, self.block)
        kept = self.order[:count].sort().values.to(weights.output.device)
        return refit(kept, weights, self.moment.to(kept.device).double())

    def shapes(
        self, dense: Mapping[str, tuple[int, int]], count: int
    ) -> dict[str, tuple[int, int]]:
        """Shapes of the block's layers with fewer channels, by name.

        Args:
            dense: (out_features, in_features) of the dense layers by name.
            count: How many channels are kept.
        """
        found = {name: (count, dense[name][1]) for name in self.block.inputs}
        return found | {self.block.output: (dense[self.block.output][0], count)}


def order_channels(
    model: nn.Module, block: FeedForward, whole: SecondMoment, form: QuadraticForm
) -> ChannelOrder | None:
    """A feed-forward's channels by price.

    Args:
        model: The dense model.
        block: The feed-forward.
        whole: Second moment of the channels themselves, n x n.
        form: The `kfac` form of the output layer.

    Returns:
        None where that layer has more outputs than inputs: such channels have no price here.

    Raises:
        NumericalError: A moment, or what comes of it, holds NaN or infinity.
    """
    side, scale = form.output, form.price_scale
    if side.moment is None or side.moment.is_projected or scale is None:
        return None
    weight = linear_weight(model.get_submodule(block.output)).double()
    gradients = damped(side.moment.matrix.double(), side)
    damping = form.input.damping
    order, counts, rises = channel_order(
        _damped(whole, damping), _weighted(whole, damping, weight, scale * gradients)
    )
    kept = _damped(whole, REFIT * damping).cpu()
    return ChannelOrder(block, order.cpu(), counts, rises, kept)


def _damped(moment: SecondMoment, damping: float) -> torch.Tensor:
    """A moment damped as in the metrics, in fp32: n x n numbers in fp64 would be a block's largest.

    Raises:
        NumericalError: It holds NaN or infinity.
    """
    result = moment.matrix.float().clone()
    check_finite("second moment", result)
    diagonal = moment.matrix.diagonal().double() + damping * moment.mean_diagonal
    result.diagonal().copy_(diagonal)
    return result


def _weighted(
    moment: SecondMoment, damping: float, weight: torch.Tensor, gradients: torch.Tensor
) -> torch.Tensor:
    """`W^T G W C` with C damped, shape (n, n), fp32; in fp64 for some columns at a time."""
    result = torch.empty_like(moment.matrix, dtype=torch.float32)
    for start in range(0, len(result), _COLUMNS):
        columns = moment.matrix[:, start : start + _COLUMNS].double()
        columns.diagonal(-start).add_(damping * moment.mean_diagonal)
        result[:, start : start + _COLUMNS] = weight.T @ (gradients @ (weight @ columns))
    return result


def channel_step(size: int, multiple: int = 1) -> int:
    """How many channels of so many are kept or lost at a time."""
    return min(multiple * math.ceil(size / (_ROUNDS * multiple)), size)


def channel_order(
    moment: torch.Tensor, weighted: torch.Tensor, multiple: int = 1
) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """All channels, those first that rebuild most of what the others are worth.

    Greedy, a 48th of the channels at a time: with `R` what is left of C after the channels chosen
    so far have explained their share (its Schur complement), a channel j would take
    `R_j^T M R_j / R_jj` off the error `tr(M R)`. Rows and columns of chosen channels are 0 in R, so
    the matrices shrink from round to round.

    Args:
        moment: C, shape (n, n), damped.
        weighted: `M C` with `M = W_out^T G W_out` in nats: G damped and times the price scale.
        multiple: What every step is a multiple of, but for the last, all channels.

    Returns:
        Indices, shape (n,); how many are kept at each step; the rise at each step, shape (steps,).

    Raises:
        NumericalError: A moment, or a price, is NaN or infinite.
    """
    left, weighted = moment.float(), weighted.float()
    del moment  # the caller's may be let go, too
    for matrix in (left, weighted):  # the first round would take such a channel and forget why
        check_finite("second moment", matrix)
    size = len(left)
    step = channel_step(size, multiple)
    free = torch.arange(size, device=left.device)
    order: list[torch.Tensor] = []
    counts: list[int] = []
    rises: list[float] = []
    while len(free):
        gains = (left * weighted).sum(dim=0) / left.diagonal().clamp_min(_TINY)
        chosen = gains.topk(min(step, len(free))).indices
        order.append(free[chosen])
        counts.append(size - len(free) + len(chosen))
        rest = torch.ones(len(free), dtype=torch.bool, device=left.device)
        rest[chosen] = False
        free = free[rest]
        core = left[chosen][:, chosen].double()
        core.diagonal().add_(_JITTER * core.diagonal().mean() + _TINY)
        image = left[chosen][:, rest].double()
        explained, failed = torch.linalg.solve_ex(core, image)
        explained = (pseudo_solved(core, image) if bool(failed) else explained).float()
        weighted = _eliminated(weighted, rest, chosen, explained)
        left = _eliminated(left, rest, chosen, explained)
        rises.append(float(weighted.diagonal().double().sum()))
    found = torch.tensor(rises, dtype=torch.float64)
    if not bool(torch.isfinite(found).all()):
        raise NumericalError("the price of a channel is NaN or infinite")
    return torch.cat(order), counts, found.clamp_min(0)


def _eliminated(
    matrix: torch.Tensor, rest: torch.Tensor, chosen: torch.Tensor, explained: torch.Tensor
) -> torch.Tensor:
    """What is left of a matrix without the chosen channels and what they explain of others."""
    places = rest.nonzero().flatten()
    share = matrix[places[:, None], chosen]
    left = matrix[places[:, None], places]
    left -= share @ explained
    return left

"""LoRAP (Li et al., ICML 2024, arXiv 2404.09695): factors for attention, pruning elsewhere.

Attention weights are decomposed with their inputs scaled by the inputs' norms; feed-forward
channels are pruned by |weight| times input norm, but the least important hundredth of them stays.
"""

from __future__ import annotations

import torch

from hf_lowrank.channels.narrowing import ChannelWeights
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.moments import SecondMoment

TAIL_SHARE = 0.01


def norm_scaled(moment: SecondMoment) -> QuadraticForm:
    """Norms of the inputs as the root of the input side: activation weighted SVD.

    `W diag(||x_j||)` is decomposed, with `||x_j||^2` the sum of squares of input j over all tokens.

    Args:
        moment: The inputs' whole second moment, of which the diagonal is used.
    """
    squares = moment.matrix.diagonal().double()
    damping = LowRankConfig.input_damping
    return QuadraticForm(input=Side(diagonal=squares + damping * squares.mean()))


def channel_importance(
    weights: ChannelWeights, input_squares: torch.Tensor, channel_squares: torch.Tensor
) -> torch.Tensor:
    """Norm over a channel's weights of |weight| times the norm of what it multiplies, shape (n,).

    A channel's weights are its row in each layer into the channels and its column in the output
    layer; the importance of one weight is that of Wanda (Sun et al., ICLR 2024).

    Args:
        weights: The feed-forward's weights.
        input_squares: Sum of squares over the tokens of each input of the block, shape (d,).
        channel_squares: The same of each channel, shape (n,).
    """
    rows = sum(rows.square() @ input_squares.double() for rows in weights.inputs)
    columns = weights.output.square().sum(dim=0) * channel_squares.double()
    return (rows + columns).sqrt()


def kept_channels(
    importance: torch.Tensor, count: int, tail_share: float = TAIL_SHARE
) -> torch.Tensor:
    """The most important channels, and the very least important ones in place of some of them.

    The paper found that the last hundredth matters to a language model.

    Args:
        importance: Shape (n,).
        count: How many channels to keep.
        tail_share: Share of all n channels that is taken from the low end, rounded.

    Returns:
        Indices in ascending order, shape (count,).
    """
    order = importance.argsort(descending=True)
    tail = min(round(tail_share * len(order)), count - 1)
    return torch.cat([order[: count - tail], order[len(order) - tail :]]).sort().values

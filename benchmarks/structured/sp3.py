"""Pruning by principal components, after SP3 (Hu et al., ACL Findings 2024, arXiv 2308.16475).

SP3 projects features on their principal components before it masks them, absorbs the projections
into the neighbouring weights, and learns the masks. Its masks are mostly on the hidden size, which
the residual stream carries through the whole model. Here the idea is applied where a single block
is enough, to the channels of a feed-forward, and in closed form. The activation function stands
before the channels, so no rotation passes through it: channels are chosen instead that stand for
the principal components, and the way back from them to all channels is absorbed by the layer after.
"""

from __future__ import annotations

import scipy.linalg
import torch

from hf_lowrank.channels.narrowing import ChannelWeights, Narrowing, refit
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import Side
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.decomposition.spectrum import damped


def principal_channels(moment: torch.Tensor, count: int) -> torch.Tensor:
    """Channels that stand for the first principal components of all channels.

    With `C = U diag(s) U^T`, the columns that a pivoted QR of `diag(s_k)^1/2 U_k^T` takes first.

    Args:
        moment: C, shape (n, n), fp64.
        count: k, the number of components and of channels.

    Returns:
        Indices in ascending order, shape (count,).
    """
    values, vectors = torch.linalg.eigh(moment)
    scaled = vectors[:, -count:] * values[-count:].clamp_min(0).sqrt()
    _, pivots = scipy.linalg.qr(scaled.T.cpu().numpy(), mode="r", pivoting=True)
    return torch.from_numpy(pivots[:count].astype("int64")).to(moment.device).sort().values


def principal_narrowing(weights: ChannelWeights, moment: SecondMoment, count: int) -> Narrowing:
    """Keeps principal channels and rebuilds the others from them in the layer after.

    Args:
        weights: The feed-forward's weights.
        moment: The channels' second moment, n x n; a small share of its mean diagonal is added,
            as in the `whitened` metric.
        count: How many channels to keep.
    """
    whole = damped(moment.matrix.double(), Side(moment=moment, damping=LowRankConfig.input_damping))
    return refit(principal_channels(whole, count), weights, whole)

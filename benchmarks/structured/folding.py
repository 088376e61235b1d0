"""Model folding (Wang et al., ICLR 2025, arXiv 2502.10216): similar channels become one, data-free.

Channels are clustered by k-means; a cluster keeps the mean of its weights into the channels and the
sum of its columns of the output layer, so channels that are equal merge without loss.
"""

from __future__ import annotations

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from hf_lowrank.channels.narrowing import ChannelWeights, Narrowing


def cluster_channels(weights: ChannelWeights, count: int, seed: int = 0) -> torch.Tensor:
    """Cluster of each channel by k-means on its weights into the channels and their biases.

    Returns:
        Numbers from 0, shape (n,); fewer clusters than `count` where fewer channels differ.
    """
    biases = [bias[:, None] for bias in weights.biases if bias is not None]
    rows = torch.cat([*weights.inputs, *biases], dim=1).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal channels: fewer clusters do
        labels = KMeans(count, n_init=1, random_state=seed).fit_predict(rows)
    _, numbers = torch.unique(torch.from_numpy(labels), return_inverse=True)
    return torch.as_tensor(numbers, device=weights.output.device)


def repair_scale(rows: torch.Tensor, mean: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What gives the mean of a cluster's rows the size that its rows have, shape (k,).

    A mean of unlike rows is shorter than they are, and activations shrink from layer to layer. For
    inputs of unit covariance the variance of `w x` is `|w|^2`, so the scale is the root of the mean
    of `|w|^2` over the cluster, divided by the norm of the mean.

    Args:
        rows: Shape (n, d).
        mean: Shape (k, n): averages the rows of each cluster.
        labels: Cluster of each row, shape (n,).
    """
    wanted = mean @ rows.square().sum(dim=1)
    found = (mean @ rows).square().sum(dim=1)
    # Opposite rows have no mean to scale; and rows of one size allow at most sqrt(members).
    members = torch.bincount(labels, minlength=len(mean)).to(rows)
    tiny = torch.finfo(rows.dtype).tiny
    return (wanted / found.clamp_min(tiny)).clamp(1.0, None).minimum(members).sqrt()


def folding_narrowing(
    weights: ChannelWeights, count: int, seed: int = 0, repair: bool = False
) -> Narrowing:
    """Merges the channels of each cluster.

    Args:
        weights: The feed-forward's weights.
        count: Number of clusters.
        seed: Seed of k-means.
        repair: Whether the merged weights into the channels are scaled by `repair_scale`.
    """
    labels = cluster_channels(weights, count, seed)
    spread = torch.nn.functional.one_hot(labels).to(weights.output)
    mean = (spread / spread.sum(dim=0)).T
    gather = tuple(
        mean * repair_scale(rows, mean, labels)[:, None] if repair else mean
        for rows in weights.inputs
    )
    return Narrowing(gather, weights.output @ spread)

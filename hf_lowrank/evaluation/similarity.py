"""Embeddings of sentences, and how well their cosines agree with what people said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from hf_lowrank.measuring.embeddings import EmbeddingLoss
from hf_lowrank.measuring.items import Batch, eval_mode

Pairs = tuple[Sequence[Batch], Sequence[Batch], Sequence[float]]


class Correlations(NamedTuple):
    """Of cosines with scores, and of their ranks."""

    pearson: float
    spearman: float


@torch.no_grad()
def embeddings(model: nn.Module, batches: Sequence[Batch], loss: EmbeddingLoss) -> torch.Tensor:
    """Embeddings of all items, on the CPU, fp32, shape (items, size)."""
    device = next(model.parameters()).device
    with eval_mode(model):
        found = [
            loss.embed(model, {name: value.to(device) for name, value in batch.items()}).cpu()
            for batch in batches
        ]
    return torch.cat(found)


def similarity(model: nn.Module, pairs: Pairs, loss: EmbeddingLoss) -> Correlations:
    """How well the cosines of pairs of sentences agree with scores.

    Args:
        model: The encoder.
        pairs: Batches of the first sentences, of the second, and the scores, in one order.
        loss: Its pooling.
    """
    first, second = (embeddings(model, batches, loss) for batches in pairs[:2])
    cosines = torch.nn.functional.cosine_similarity(first, second).double().numpy()
    return correlations(cosines, pairs[2])


def correlations(cosines: np.ndarray, scores: Sequence[float]) -> Correlations:
    """Of cosines with scores, both of shape (pairs,); 0 where either is constant."""
    given = np.asarray(scores, dtype=np.float64)
    return Correlations(_pearson(cosines, given), _pearson(_ranks(cosines), _ranks(given)))


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    """0 for constant values, which have no correlation."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: np.ndarray = (last - (counts - 1) / 2)[places]
    return shared

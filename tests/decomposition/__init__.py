"""A layer with known inputs and gradients, and its decomposition by numpy in fp64."""

import numpy as np
import pytest
import torch

from hf_lowrank.decomposition.metrics import METRICS, MetricSettings
from hf_lowrank.decomposition.moments import Moments, SecondMoment

SHAPES = {"tall": (7, 4), "wide": (4, 7), "square": (5, 5)}
SETTINGS = MetricSettings(input_damping=0.05, output_damping=0.2, activation_alpha=0.7)
UNDAMPED = MetricSettings(input_damping=0.0, output_damping=0.0, activation_alpha=0.5)
TOKENS, LOSSES = 40, 31
all_metrics = pytest.mark.parametrize("metric", sorted(METRICS))
all_shapes = pytest.mark.parametrize("shape", sorted(SHAPES))
both_kinds = pytest.mark.parametrize("projected", [False, True], ids=["full", "projected"])


class Layer:
    """A weight with inputs and gradients whose coordinates differ in scale."""

    def __init__(self, shape, tokens=TOKENS, seed=0):
        rng = np.random.default_rng(seed)
        m, n = SHAPES[shape]
        self.W = rng.normal(size=(m, n))
        self.x = rng.normal(size=(tokens, n)) @ rng.normal(size=(n, n)) * np.linspace(0.3, 2, n)
        self.g = rng.normal(size=(tokens, m)) @ rng.normal(size=(m, m)) * np.linspace(3, 0.2, m)
        self.rows = rng.uniform(0.1, 4.0, size=m)
        pruned = rng.uniform(size=(m, n)) < np.linspace(0.0, 0.6, m)[:, None]
        self.W[:, 1:][pruned[:, 1:]] = 0.0  # rows differ in their survivors; none is without

    @property
    def weight(self):
        return torch.from_numpy(self.W)

    def moments(self, projected=False):
        m, n = self.W.shape
        return Moments(
            input=second_moment(self.x, self.W.T if projected and n > m else None),
            input_centred=second_moment(
                self.x - self.x.mean(0), self.W.T if projected and n > m else None
            ),
            output=second_moment(self.g, self.W if projected and m > n else None),
            input_abs=torch.from_numpy(np.abs(self.x).sum(0)),
            gradient_rows=torch.from_numpy(self.rows),
            tokens=len(self.x),
            losses=LOSSES,
        )

    def form(self, metric, settings=SETTINGS, projected=False):
        return METRICS[metric].form(self.moments(projected), settings)

    def sides(self, metric, settings=SETTINGS):
        """`(P, Q)` as the papers have them."""
        m, n = self.W.shape
        P, Q = np.eye(m), np.eye(n)
        if metric == "fisher-rows":
            P = np.diag(self.rows + 1e-6 * self.rows.mean())
        if metric == "activation-scale":
            mean = np.abs(self.x).mean(0)
            root = np.diag((mean + 1e-6 * mean.mean()) ** settings.activation_alpha)
            Q = root @ root
        if metric in ("whitened", "kfac", "sparsity-whitened"):
            Q = damped(self.x.T @ self.x, settings.input_damping)
        if metric == "pooled":
            centred = self.x - self.x.mean(0)
            Q = damped(centred.T @ centred, settings.input_damping)
        if metric == "kfac":
            P = damped(self.g.T @ self.g, settings.output_damping)
        if metric.startswith("sparsity"):
            P = np.diag((self.W != 0).sum(axis=1).clip(1).astype(float))
        return P, Q


def second_moment(rows, image_by=None):
    images = rows if image_by is None else rows @ image_by
    squares = float((rows**2).sum())
    return SecondMoment(torch.from_numpy(images.T @ images), squares, rows.shape[1])


def damped(matrix, damping):
    return matrix + damping * np.mean(np.diag(matrix)) * np.eye(len(matrix))


def reference(W, P, Q):
    """`[W_1, ..., W_r]` and sigma by the SVD of `L^T W R`, mapped back by solves."""
    L, R = np.linalg.cholesky(P), np.linalg.cholesky(Q)
    U, sigma, Vt = np.linalg.svd(L.T @ W @ R, full_matrices=False)
    left = np.linalg.solve(L.T, U * sigma)
    right = np.linalg.solve(R.T, Vt.T).T
    return [left[:, :k] @ right[:k] for k in range(1, len(sigma) + 1)], sigma


def error_of(W_k, W, P, Q):
    D = W - W_k
    return float(np.trace(P @ D @ Q @ D.T))


def truncated(factors, rank):
    return factors.product(rank).double().numpy()

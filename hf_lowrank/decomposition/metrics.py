"""Metrics: in what the truncation error of a weight is measured.

Every metric is a pair of quadratic forms, P on the output side and Q on the input side. The error
of replacing `W` by `W_k` is `tr(P D Q D^T)` with `D = W - W_k`. The best rank-k approximation is
the truncated SVD of `L^T W R` with `P = L L^T`, `Q = R R^T`, mapped back (docs/methods.md,
section 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from hf_lowrank.decomposition.moments import Moments, SecondMoment

Value = TypeVar("Value")


@dataclass(frozen=True)
class Side:
    """One side of a metric: a diagonal, a damped second moment, or neither for the identity.

    Attributes:
        diagonal: Shape of the side's vectors, fp64.
        moment: A second moment.
        damping: Share of the moment's mean diagonal that is added to its diagonal.
        survivors: Whether the diagonal is the number of non-zero weights of each of the side's
            units, at least 1. `decompose` counts them, so no data is needed.
    """

    diagonal: torch.Tensor | None = None
    moment: SecondMoment | None = None
    damping: float = 0.0
    survivors: bool = False


@dataclass(frozen=True)
class QuadraticForm:
    """Both sides of a metric.

    Attributes:
        output: Side of the layer's outputs.
        input: Side of the layer's inputs.
        price_scale: Factor from squared singular values to the predicted rise of the mean loss
            in nats, or None where the metric says nothing about the loss.
    """

    output: Side = Side()
    input: Side = Side()
    price_scale: float | None = None


@dataclass(frozen=True)
class MetricSettings:
    """Numbers that the metrics read; see the fields of `LowRankConfig` of the same names."""

    input_damping: float
    output_damping: float
    activation_alpha: float


@dataclass(frozen=True)
class Metric:
    """A named metric.

    Attributes:
        needs: Statistics that it reads; names of `Moments` fields.
        form: Builds the quadratic form of one layer from its moments.
        even: Whether tokens are weighted by what they contribute, see `evenly`.
    """

    needs: frozenset[str]
    form: Callable[[Moments, MetricSettings], QuadraticForm]
    even: bool = False


def _plain(moments: Moments, settings: MetricSettings) -> QuadraticForm:
    """Identity on both sides: Eckart-Young-Mirsky."""
    return QuadraticForm()


def _fisher_rows(moments: Moments, settings: MetricSettings) -> QuadraticForm:
    """Row sums of the squared gradient on the output side: FWSVD (Hsu et al., ICLR 2022)."""
    rows = _required(moments.gradient_rows).double()
    return QuadraticForm(output=Side(diagonal=_floored(rows)))


def _activation_scale(moments: Moments, settings: MetricSettings) -> QuadraticForm:
    """`diag(mean |x| ^ alpha)` as the root of the input side: ASVD (Yuan et al., 2023)."""
    mean = _floored(_required(moments.input_abs).double() / moments.tokens)
    return QuadraticForm(input=Side(diagonal=mean ** (2 * settings.activation_alpha)))


def _whitened(moments: Moments, settings: MetricSettings) -> QuadraticForm:
    """Input second moment: SVD-LLM (ICLR 2025), same optimum as DRONE (NeurIPS 2021).

    Also that of LORD (Kaushal et al., 2023), the projection `U_k U_k^T W` on the first
    eigenvectors of the outputs' second moment `W C W^T`: with `C = R R^T` these are the left
    singular vectors of `W R`, so that `U_k U_k^T W = U_k S_k V_k^T R^-1`.
    """
    return QuadraticForm(input=Side(None, _required(moments.input), settings.input_damping))


def _pooled(moments: Moments, settings: MetricSettings) -> QuadraticForm:
    """Covariance of the inputs pooled over sequences: Bolaco (Ji et al., EMNLP Findings 2024).

    `U_k` are the first eigenvectors of the outputs' covariance within sequences, `W C W^T` with
    `C` the covariance of the inputs, as in `whitened`. Simplified: the paper also restores the
    outputs' mean by a bias; layers without one have no place for it, so the mean is lost here
    as far as it lies outside the kept directions.
    """
    centred = _required(moments.input_centred)
    return QuadraticForm(input=Side(None, centred, settings.input_damping))


def _kfac(moments: Moments, settings: MetricSettings) -> QuadraticForm:
    """Both second moments: Kronecker-factored curvature (Martens and Grosse, 2015).

    With `C` and `G` summed over N tokens the curvature of the summed loss is about `C (x) G / N`,
    so dropping a component with singular value sigma raises the mean over M losses by
    `sigma^2 / (2 N M)`. For language models M = N. Of tokens that are weighted evenly the product
    is scaled to the trace of the curvature, `sum |x|^2 |g|^2`, in place of `1 / N`.
    """
    output, inputs = _required(moments.output), _required(moments.input)
    share = 1.0 / moments.tokens
    if moments.strength == 0:  # the loss does not depend on this layer
        return QuadraticForm(price_scale=0.0)
    if moments.strength is not None:
        share = moments.strength / (output.squares * inputs.squares)
    return QuadraticForm(
        output=Side(None, output, settings.output_damping),
        input=Side(None, inputs, settings.input_damping),
        price_scale=share / (2.0 * moments.losses),
    )


def _sparsity(moments: Moments, settings: MetricSettings) -> QuadraticForm:
    """Surviving weights of each row on the output side: LPAF (Ren and Zhu 2023, 2306.14152)."""
    return QuadraticForm(output=Side(survivors=True))


def _sparsity_whitened(moments: Moments, settings: MetricSettings) -> QuadraticForm:
    """Surviving weights on the output side, second moment on the input side."""
    return QuadraticForm(Side(survivors=True), _whitened(moments, settings).input)


def _required(value: Value | None) -> Value:
    if value is None:
        raise ValueError("The metric needs statistics that were not collected.")
    return value


def _floored(values: torch.Tensor) -> torch.Tensor:
    """Keeps a diagonal invertible: a millionth of its mean is added."""
    return values + 1e-6 * values.mean()


METRICS: dict[str, Metric] = {
    "plain": Metric(frozenset(), _plain),
    "fisher-rows": Metric(frozenset({"gradient_rows"}), _fisher_rows),
    "activation-scale": Metric(frozenset({"input_abs"}), _activation_scale),
    "whitened": Metric(frozenset({"input"}), _whitened),
    "pooled": Metric(frozenset({"input_centred"}), _pooled),
    "kfac": Metric(frozenset({"input", "output"}), _kfac, even=True),
    "sparsity": Metric(frozenset(), _sparsity),
    "sparsity-whitened": Metric(frozenset({"input"}), _sparsity_whitened),
}

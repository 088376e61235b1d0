"""The loss-error bounds of the IJCAI 2025 paper (Theorems 1 to 3), as functions.

They are proven for feed-forward networks without biases, `X^l = a_l(W^l X^{l-1})`, whose
activations are rho_l-Lipschitz with a_l(0) = 0. Attention, residual connections and normalisation
are outside them: for transformers this library uses no closed form, and the guarantee is the
measured loss on the batches that the report names (docs/methods.md, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_lowrank.errors import ConfigError
from hf_lowrank.value_checks import check_not_negative, check_positive


def output_error_bound(
    largest: Sequence[float],
    dropped: Sequence[float],
    input_norm: float,
    lipschitz: Sequence[float] | None = None,
) -> float:
    """Theorem 1: bound on `||X^L - X_k^L||` of a network with every layer truncated.

    `(prod_l rho_l sigma_1^l) (sum_l sigma_{k_l + 1}^l / sigma_1^l) ||X^0||`. The truncated layers'
    norms are at most those of the full ones, so their order does not matter.

    Args:
        largest: sigma_1 of each layer.
        dropped: sigma_{k_l + 1} of each layer, the largest dropped one; 0 where nothing is.
        input_norm: `||X^0||`, Euclidean (Frobenius for a batch).
        lipschitz: rho_l of each activation; 1 by default (ReLU, tanh).

    Raises:
        ConfigError: Lengths differ, or a value is negative or not a number.
    """
    rho = _checked(largest, lipschitz)
    if len(dropped) != len(largest) or any(not 0 <= value < math.inf for value in dropped):
        raise ConfigError("dropped must hold one singular value >= 0 for each layer.")
    check_not_negative("input_norm", input_norm)
    gain = math.prod(r * s for r, s in zip(rho, largest, strict=True))
    relative = sum(d / s for d, s in zip(dropped, largest, strict=True))
    return gain * relative * input_norm


def cross_entropy_threshold(
    tolerance: float,
    largest: Sequence[float],
    input_bound: float,
    lipschitz: Sequence[float] | None = None,
) -> float:
    """Theorem 2: delta that keeps the cross-entropy within a tolerance.

    If `sigma_{k_l + 1} / sigma_1 < delta` in every layer, with
    `delta = epsilon / (sqrt(2) B L prod_l rho_l sigma_1^l)`, then `|L(W) - L(W_k)| < epsilon` for
    every input with `||X^0|| <= B`: the cross-entropy of logits is sqrt(2)-Lipschitz.

    Args:
        tolerance: epsilon, nats, > 0.
        largest: sigma_1 of each layer.
        input_bound: B, > 0.
        lipschitz: rho_l of each activation; 1 by default.

    Raises:
        ConfigError: A value is out of range.
    """
    return distance_threshold(tolerance, largest, input_bound, lipschitz) / math.sqrt(2.0)


def distance_threshold(
    tolerance: float,
    largest: Sequence[float],
    input_bound: float,
    lipschitz: Sequence[float] | None = None,
) -> float:
    """Theorem 3: delta for the loss `||z - y||`, which is 1-Lipschitz in the output z.

    `delta = epsilon / (B L prod_l rho_l sigma_1^l)`; otherwise as `cross_entropy_threshold`.
    """
    rho = _checked(largest, lipschitz)
    for name, value in (("tolerance", tolerance), ("input_bound", input_bound)):
        check_positive(name, value)
    gain = math.prod(r * s for r, s in zip(rho, largest, strict=True))
    return tolerance / (input_bound * len(largest) * gain)


def _checked(largest: Sequence[float], lipschitz: Sequence[float] | None) -> Sequence[float]:
    rho = [1.0] * len(largest) if lipschitz is None else lipschitz
    if not largest or len(rho) != len(largest):
        raise ConfigError("largest and lipschitz must hold one value for each layer.")
    if any(not 0 < value < math.inf for value in (*largest, *rho)):
        raise ConfigError("Singular values and Lipschitz constants must be > 0 and finite.")
    return rho

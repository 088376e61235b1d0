"""Basis Sharing (Wang et al., ICLR 2025, arXiv 2410.03765): neighbouring layers share a factor.

    [W_1; ...; W_g] R = U S V^T,  R R^T = C_1 + ... + C_g,
    W_l = (rows of l in U_k S_k) V_k^T R^-1.

The basis `V_k^T R^-1` (k x n) is one module in all g layers of a group; each has its own
coefficients (m x k). So a group keeps `k (n + g m)` parameters of `g m n`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from hf_lowrank.channels.narrowing import filled
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.decomposition.spectrum import Factors, decompose
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.modeling.targets import match_name

# Layers that read the residual stream. The paper shares nothing among those that write to it.
SHARED_KINDS = (
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"),  # Llama, OPT
    *("c_attn", "c_fc"),  # GPT-2
    *("query", "key", "value", "intermediate.dense"),  # BERT
    *("q", "k", "v", "wi", "wi_0", "wi_1"),  # T5
)


def neighbours(names: Sequence[str], size: int = 2) -> list[list[str]]:
    """Layers of one kind in so many blocks that follow each other, for the kinds that share.

    The kind is the name but for its first number, which is the block's. What is left over at the
    end of the model is a smaller group, or none if it is a single layer.
    """
    kinds: dict[tuple[str, ...], dict[int, str]] = {}
    for name in names:
        found = re.fullmatch(r"(|.*?\.)(\d+)(\..*)", name)
        if found and any(match_name(name, kind) for kind in SHARED_KINDS):
            kinds.setdefault((found[1], found[3]), {})[int(found[2])] = name
    groups = []
    for blocks in kinds.values():
        ordered = [blocks[number] for number in sorted(blocks)]
        groups += [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [group for group in groups if len(group) > 1]


def shared_rank(shape: tuple[int, int], members: int, param_ratio: float) -> int:
    """Largest k with `k (n + g m) <= param_ratio g m n`, at most what is exact already.

    Raises:
        ConfigError: Not even 1.
    """
    rows, columns = shape[0] * members, shape[1]
    rank = math.floor(param_ratio * rows * columns / (rows + columns) + 1e-9)
    if rank < 1:
        raise ConfigError(
            f"param_ratio {param_ratio} is too small for a basis that {members} layers of shape "
            f"{shape} share; raise it."
        )
    return min(rank, rows, columns)


def shared_factors(layers: Mapping[str, nn.Module], moments: Sequence[SecondMoment]) -> Factors:
    """Factors of the layers' weights one above the other, in the metric of all their inputs.

    Args:
        layers: Layers of one shape (m, n), by name.
        moments: Whole second moment of each layer's inputs.

    Returns:
        Its `right` is the basis, its `left` all coefficients, shape (g m, r).

    Raises:
        TargetError: The shapes differ.
    """
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise TargetError(
                f"{name}: has shape {shape} and can't share a basis with {first} of shape "
                f"{shapes[first]}."
            )
    total = SecondMoment(
        torch.stack([moment.matrix for moment in moments]).sum(dim=0),
        sum(moment.squares for moment in moments),
        moments[0].size,
    )
    stacked = torch.cat([linear_weight(layer) for layer in layers.values()])
    side = Side(moment=total, damping=LowRankConfig.input_damping)
    return decompose(stacked, QuadraticForm(input=side))[1]


@torch.no_grad()
def shared_layers(
    layers: Mapping[str, nn.Module], factors: Factors, rank: int
) -> dict[str, nn.Module]:
    """Layers that apply one common basis, then their own coefficients, by name.

    Each is `nn.Sequential(basis, coefficients)` with the same module as basis: its rank may exceed
    m, which a `LowRankLinear` would refuse.
    """
    factor_a, factor_b = factors.balanced(rank)
    basis: nn.Linear | None = None
    shared: dict[str, nn.Module] = {}
    parts = factor_b.split(len(factor_b) // len(layers))
    for (name, layer), part in zip(layers.items(), parts, strict=True):
        basis = basis or _linear(layer, factor_a, None)
        coefficients = _linear(layer, part, cast("torch.Tensor | None", layer.bias))
        shared[name] = nn.Sequential(basis, coefficients).train(layer.training)
    return shared


def _linear(source: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """An `nn.Linear` of a source's dtype, device and mode; weight of shape (out, in)."""
    dtype = cast(torch.Tensor, source.weight).dtype
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias is not None, device="meta", dtype=dtype)
    return filled(layer, source, weight, bias)

"""The auxiliary losses of SVD training (Yang et al., 2020; IJCAI 2025)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.value_checks import check_choice

RANK_PENALTIES = ("hoyer", "nuclear", "none")


def orthogonality_penalty(layers: Iterable[LowRankLinear]) -> torch.Tensor:
    """`sum over layers of (||U^T U - I||_F^2 + ||V V^T - I||_F^2) / k^2`, a scalar."""
    total: torch.Tensor | None = None
    for layer in layers:
        U, V = layer.lowrank_B.weight, layer.lowrank_A.weight
        eye = torch.eye(layer.rank, dtype=U.dtype, device=U.device)
        part = (U.T @ U - eye).square().sum() + (V @ V.T - eye).square().sum()
        part = part / layer.rank**2
        total = part if total is None else total + part
    return torch.zeros(()) if total is None else total


def rank_penalty(layers: Iterable[LowRankLinear], kind: str) -> torch.Tensor:
    """`sum ||s||_1` ("nuclear") or `sum ||s||_1 / ||s||_2` ("hoyer"), a scalar.

    Raises:
        ConfigError: The kind is unknown.
    """
    check_choice("rank_penalty", kind, RANK_PENALTIES)
    total: torch.Tensor | None = None
    for layer in layers:
        s = layer.lowrank_s
        if s is None or kind == "none":
            continue
        part = s.abs().sum()
        if kind == "hoyer":
            part = part / s.norm().clamp_min(torch.finfo(s.dtype).tiny)
        total = part if total is None else total + part
    return torch.zeros(()) if total is None else total

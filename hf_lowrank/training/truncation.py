"""Cuts layers in training form: parameters and the optimizer's state together.

The kept components are the leading ones of the factors' SVD, so the basis turns as it is cut:
`U' = U T`, `V' = S V`. For orthonormal factors T and S are orthonormal and gradients turn the
same way, so the optimizer's first moments are turned with the parameters, and the second moments
with the squared coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.decomposition.thin import thin_svd
from hf_lowrank.errors import NumericalError
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.modeling.surgery import replace_layer_

USV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def cut_factors(factors: Factors, rank: int) -> USV:
    """`U` (m, rank), `s` (rank,), `V` (rank, n) of the best approximation of this rank."""
    return thin_svd(factors.left[:, :rank], factors.right[:rank])


@torch.no_grad()
def set_factors_(layer: LowRankLinear, factors: USV) -> None:
    """Gives a layer in training form new factors, maybe of another rank, in place."""
    if layer.lowrank_s is None:
        raise ValueError("The layer is not in training form.")
    U, s, V = factors
    for parameter, value in (
        (layer.lowrank_B.weight, U),
        (layer.lowrank_s, s),
        (layer.lowrank_A.weight, V),
    ):
        parameter.data = value.to(parameter).contiguous()
        parameter.grad = None
    layer.lowrank_A.out_features = layer.lowrank_B.in_features = len(s)


def get_factors(layer: LowRankLinear) -> USV:
    """The layer's `U`, `s`, `V` as they are, without a copy."""
    if layer.lowrank_s is None:
        raise ValueError("The layer is not in training form.")
    return layer.lowrank_B.weight.data, layer.lowrank_s.data, layer.lowrank_A.weight.data


@contextmanager
def probed(
    layers: Mapping[str, LowRankLinear],
    factors: Mapping[str, Factors],
    ranks: Mapping[str, int | None],
) -> Iterator[None]:
    """Layers cut to the given ranks for the time of the block; afterwards bit for bit as before."""
    kept = {name: get_factors(layer) for name, layer in layers.items()}
    try:
        for name, rank in ranks.items():
            if name in layers and rank is not None and rank < layers[name].rank:
                set_factors_(layers[name], cut_factors(factors[name], rank))
        yield
    finally:
        for name, whole in kept.items():
            set_factors_(layers[name], whole)


@torch.no_grad()
def truncate_(
    layer: LowRankLinear, factors: USV, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Cuts a layer to new factors and turns the optimizer's moments into their basis, in place.

    Args:
        layer: Layer in training form.
        factors: New `U`, `s`, `V`, of a smaller rank.
        optimizer: Optimizer whose state holds moments of the layer's parameters.

    Raises:
        NumericalError: The layer's factors can't be turned into the new ones. Nothing is changed.
    """
    U, _, V = get_factors(layer)
    turn_u, turn_v = _turn(U, factors[0]), _turn(V.T, factors[2].T)
    set_factors_(layer, factors)
    if optimizer is None or layer.lowrank_s is None:
        return
    states = [
        optimizer.state.get(parameter, {})
        for parameter in (layer.lowrank_B.weight, layer.lowrank_A.weight, layer.lowrank_s)
    ]
    for names, power in ((_FIRST_MOMENTS, 1), (_SECOND_MOMENTS, 2)):
        powers = turn_u**power, turn_v**power
        for state, left, right in zip(
            states,
            (None, powers[1].T, (powers[0] * powers[1]).T),
            (powers[0], None, None),
            strict=True,
        ):
            for name in names:
                if name in state:
                    _turn_(state, name, left, right)


def _turn(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`T` with `old T` as near to `new` as can be, fp64."""
    old, new = old.double(), new.double()
    if bool(old.isfinite().all() & new.isfinite().all()):
        turn: torch.Tensor = torch.linalg.lstsq(old, new).solution
        if bool(turn.isfinite().all()):  # on a GPU dependent columns have none
            return turn
    raise NumericalError("its factors are singular, or hold NaN or infinity")


def _turn_(
    state: dict[str, torch.Tensor],
    name: str,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
) -> None:
    moment = state[name].double()
    moment = moment if left is None else left @ moment
    moment = moment if right is None else moment @ right
    state[name] = moment.to(state[name]).contiguous()


@torch.no_grad()
def make_dense_(
    model: nn.Module, name: str, layer: LowRankLinear, optimizer: torch.optim.Optimizer | None
) -> None:
    """Multiplies a layer out, in place; the optimizer goes on with the dense weight.

    The dense weight takes the place of `U` in the optimizer and starts with fresh moments; the
    bias keeps its own.
    """
    dense = layer.to_dense()
    dense.train(layer.training)
    if layer.bias is not None:
        dense.bias = layer.bias
    replace_layer_(model, name, dense)
    if optimizer is None:
        return
    gone = {id(layer.lowrank_A.weight), id(layer.lowrank_s)}
    for group in optimizer.param_groups:
        group["params"] = [
            dense.weight if parameter is layer.lowrank_B.weight else parameter
            for parameter in group["params"]
            if id(parameter) not in gone
        ]
    for parameter in (layer.lowrank_A.weight, layer.lowrank_B.weight, layer.lowrank_s):
        if parameter is not None:
            optimizer.state.pop(parameter, None)

"""Mixed-rank fine-tuning: each layer computes now with its sparse matrix, now with its factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.errors import TargetError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.modeling.surgery import empty_lowrank, replace_layer_


class MixedRankLinear(LowRankLinear):
    """A `LowRankLinear` that also holds the sparse matrix which its factors came from.

    In training mode it computes `W_sp x + bias` while `uses_sparse` is set, else, and always in
    eval mode, `B (A x) + bias`. The sparse matrix is frozen: it is there to be left behind, so the
    factors learn beside a fixed reference, no optimizer state is held for it, and it is not part
    of the state dict, which is that of the plain layer at all times.

    Args:
        factors: The layer whose parameters are shared, in inference form.
        sparse: W_sp, shape (m, n); zeros are stored.
    """

    sparse: torch.Tensor

    def __init__(self, factors: LowRankLinear, sparse: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = factors.in_features, factors.out_features
        self.conv1d = factors.conv1d
        self.lowrank_A, self.lowrank_B = factors.lowrank_A, factors.lowrank_B
        self.lowrank_s = None
        device = factors.lowrank_A.weight.device
        self.register_buffer("sparse", sparse.to(device), persistent=False)
        self.uses_sparse = False
        self.train(factors.training)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the layer to an input of shape (..., n); returns shape (..., m)."""
        if self.training and self.uses_sparse:
            return F.linear(hidden_states, self.sparse, self.bias)
        return super().forward(hidden_states)

    def plain(self) -> LowRankLinear:
        """The layer without its sparse matrix; its parameters are the same objects."""
        layer = empty_lowrank(self, self.rank)
        layer.lowrank_A, layer.lowrank_B = self.lowrank_A, self.lowrank_B
        return layer


def mix_(model: nn.Module, sparse_layers: Mapping[str, nn.Module]) -> dict[str, MixedRankLinear]:
    """Gives low-rank layers their sparse matrices, in place.

    Args:
        model: The compressed model.
        sparse_layers: The dense layers with zeros that were factorized, by name.

    Returns:
        The layers now in place, by name.

    Raises:
        TargetError: A name is no low-rank layer of the model in inference form, or has another
            shape. Nothing has been edited then.
    """
    layers = factorized_layers(model)
    for name, sparse in sparse_layers.items():
        layer = layers.get(name)
        if layer is None or layer.lowrank_s is not None:
            raise TargetError(f"{name}: is no low-rank layer of two factors.")
        if linear_shape(layer) != linear_shape(sparse):
            raise TargetError(
                f"{name}: the sparse matrix has shape {linear_shape(sparse)}, the factors are for "
                f"{linear_shape(layer)}."
            )
    mixed = {
        name: MixedRankLinear(layers[name], linear_weight(sparse))
        for name, sparse in sparse_layers.items()
    }
    for name, layer in mixed.items():
        replace_layer_(model, name, layer)
    return mixed


def unmix_(model: nn.Module) -> None:
    """Frees all sparse matrices, in place: plain `LowRankLinear` layers are left."""
    for name, layer in mixed_layers(model).items():
        replace_layer_(model, name, layer.plain())


def mixed_layers(model: nn.Module) -> dict[str, MixedRankLinear]:
    """The layers that hold a sparse matrix, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MixedRankLinear)}


def draw_gates_(layers: Mapping[str, MixedRankLinear], probability: float) -> None:
    """Draws for each layer on its own whether it uses its sparse matrix, in place.

    The draws come from torch's random state on the CPU, which checkpoints bring back.
    """
    draws = cast("list[float]", torch.rand(len(layers)).tolist())
    for layer, draw in zip(layers.values(), draws, strict=True):
        layer.uses_sparse = draw < probability

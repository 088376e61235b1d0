"""Dense layers in both layouts: `nn.Linear`, and `Conv1D`, whose weight is stored transposed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.format.torchao_weights import is_quantized


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an `nn.Linear` or a transformers `Conv1D`."""
    if isinstance(layer, Conv1D):
        return int(layer.nf), int(layer.nx)
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def linear_weight(layer: nn.Module) -> torch.Tensor:
    """The layer's weight as (out_features, in_features), without gradient.

    Not a copy, unless the weight is quantized.
    """
    weight = plain(cast(torch.Tensor, layer.weight)).detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def plain(weight: torch.Tensor) -> torch.Tensor:
    """A weight itself, or the numbers that a quantized one stands for."""
    return weight.dequantize() if is_quantized(weight) else weight


def dense_layer(weight: torch.Tensor, bias: torch.Tensor | None, conv1d: bool) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D`, with a weight of shape (out, in) and a bias."""
    rows, columns = weight.shape
    with torch.device("meta"):  # no random start, so the random state is left alone
        layer: Any = Conv1D(rows, columns) if conv1d else nn.Linear(columns, rows, bias is not None)
    layer = layer.to(weight.dtype).to_empty(device=weight.device)
    layer.weight.copy_(weight.T if conv1d else weight)
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)
    dense: nn.Module = layer
    return dense


def layer_options(layer: nn.Linear | Conv1D) -> dict[str, Any]:
    """Keywords for a compressed layer in a dense one's place: bias, kind, device and dtype."""
    return {
        "bias": layer.bias is not None,
        "conv1d": isinstance(layer, Conv1D),
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }

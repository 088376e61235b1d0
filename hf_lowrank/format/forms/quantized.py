"""Layers that keep all their numbers, in fewer bits each."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.format.dense_linear import (
    dense_layer,
    layer_options,
    linear_shape,
    linear_weight,
)
from hf_lowrank.format.forms.stored_form import CompressedLayer, StoredForm, register
from hf_lowrank.format.layout import Precision


class QuantizedLinear(CompressedLayer, nn.Linear):
    """A layer that stays dense, with a weight that is quantized.

    Args:
        in_features: Size n of the input's last axis.
        out_features: Size m of the output's last axis.
        bias: Whether there is a bias of shape (m,).
        conv1d: Whether the layer stands in for a transformers `Conv1D`; the weight here is (m, n)
            all the same.
        device: Device of the new parameters.
        dtype: Data type of the new parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.conv1d = conv1d

    @property
    def form(self) -> str:
        """Always "quantized"."""
        return "quantized"

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The dense layer with the same output: `nn.Linear`, or `Conv1D` if it came from one."""
        return dense_layer(linear_weight(self), self.bias, self.conv1d)


@register
class QuantizedForm(StoredForm):
    """A `QuantizedLinear` with a weight of the dense layer's shape."""

    name = "quantized"
    listed_in = "quantized"
    entry = "precision"
    content = "weight"
    tensors = ("weight",)

    def shapes(self, shape: tuple[int, int], entry: Precision) -> list[tuple[int, ...]]:
        """That of the dense layer."""
        return [shape]

    def empty_layer(self, layer: nn.Linear | Conv1D, entry: Precision) -> CompressedLayer:
        """A `QuantizedLinear`, whose weight is not quantized yet."""
        rows, columns = linear_shape(layer)
        return QuantizedLinear(columns, rows, **layer_options(layer))

"""Layers of a feed-forward that lost channels: dense, but smaller."""

from __future__ import annotations

from collections.abc import Sequence

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


class NarrowedLinear(CompressedLayer, nn.Linear):
    """A layer of a feed-forward that has lost channels: a dense layer, but smaller.

    Args:
        in_features: Inputs left.
        out_features: Outputs left.
        bias: Whether there is a bias.
        dense_shape: (out_features, in_features) of the layer whose place it takes.
        conv1d: Whether that is a transformers `Conv1D`; the weight here is (out, in) all the same.
        device: Device of the new parameters.
        dtype: Data type of the new parameters.

    Raises:
        ValueError: A size is outside `1..` that of the dense layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dense_shape: tuple[int, int],
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (1 <= out_features <= dense_shape[0] and 1 <= in_features <= dense_shape[1]):
            raise ValueError(
                f"shape ({out_features}, {in_features}) is not within that of the dense layer, "
                f"{tuple(dense_shape)}."
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.dense_shape = dense_shape
        self.conv1d = conv1d

    @property
    def form(self) -> str:
        """Always "narrowed"."""
        return "narrowed"

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The layer of full size, zeros where channels are missing.

        With all layers of a feed-forward it computes the same: the output layer multiplies the
        lost channels by 0.
        """
        weight = linear_weight(self)
        missing = [full - left for full, left in zip(self.dense_shape, weight.shape, strict=True)]
        weight = nn.functional.pad(weight, (0, missing[1], 0, missing[0]))
        bias = None if self.bias is None else nn.functional.pad(self.bias, (0, missing[0]))
        return dense_layer(weight, bias, self.conv1d)

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"{super().extra_repr()}, dense_shape={tuple(self.dense_shape)}"


@register
class NarrowedForm(StoredForm):
    """A `NarrowedLinear` with a weight of the shape in config.json."""

    name = "narrowed"
    listed_in = "narrowed"
    entry = "shape"
    content = "weight"
    tensors = ("weight",)

    def shapes(self, shape: tuple[int, int], entry: Sequence[int]) -> list[tuple[int, ...]]:
        """The entry itself, (out_features, in_features)."""
        return [tuple(entry)]

    def empty_layer(self, layer: nn.Linear | Conv1D, entry: Sequence[int]) -> CompressedLayer:
        """A `NarrowedLinear` of the shape."""
        options = layer_options(layer)
        return NarrowedLinear(entry[1], entry[0], dense_shape=linear_shape(layer), **options)

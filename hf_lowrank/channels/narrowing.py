"""Narrower feed-forwards.

Whatever a system does to channels, pruning or merging, leaves each layer into the channels with
fewer rows, and the output layer with fewer columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.decomposition.spectrum import check_finite
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.format.feed_forward import FeedForward
from hf_lowrank.format.forms.narrowed import NarrowedLinear

Linear = TypeVar("Linear", bound=nn.Linear)


@dataclass(frozen=True)
class ChannelWeights:
    """A feed-forward's weights by channel, fp64.

    Attributes:
        inputs: Shape (n, d) for each layer into the n channels.
        biases: Their biases, shape (n,), or None.
        output: Shape (d_out, n).
    """

    inputs: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    output: torch.Tensor


@dataclass(frozen=True)
class Narrowing:
    """From n channels to k.

    Attributes:
        gather: For each layer into the channels the indices of those that stay as they are, shape
            (k,), or a map of shape (k, n): `W' = gather W`, `b' = gather b`.
        output: The output layer's new weight, shape (d_out, k).
    """

    gather: tuple[torch.Tensor, ...]
    output: torch.Tensor


def channel_weights(model: nn.Module, block: FeedForward) -> ChannelWeights:
    """The block's weights, always as (out_features, in_features)."""
    layers = [model.get_submodule(name) for name in block.inputs]
    biases = [cast("torch.Tensor | None", layer.bias) for layer in layers]
    return ChannelWeights(
        tuple(linear_weight(layer).double() for layer in layers),
        tuple(None if bias is None else bias.detach().double() for bias in biases),
        linear_weight(model.get_submodule(block.output)).double(),
    )


def selection(kept: torch.Tensor, weights: ChannelWeights) -> Narrowing:
    """Keeps channels as they are and drops the others.

    Args:
        kept: Indices, shape (k,).
        weights: The feed-forward's weights.
    """
    return Narrowing((kept,) * len(weights.inputs), weights.output[:, kept])


def refit(kept: torch.Tensor, weights: ChannelWeights, moment: torch.Tensor) -> Narrowing:
    """Keeps channels as they are; the layer after rebuilds the others from them.

    The best linear map from the kept channels S to all is `C[:, S] C[S, S]^-1`, which the weight
    absorbs.

    Args:
        kept: Indices, shape (k,).
        weights: The feed-forward's weights.
        moment: C, second moment of the channels, shape (n, n), fp64, damped.

    Raises:
        NumericalError: The moment holds NaN or infinity.
    """
    check_finite("second moment", moment)
    core, image = moment[kept][:, kept], moment[kept] @ weights.output.T
    root, failed = torch.linalg.cholesky_ex(core)
    # It fails where hardly damped, and with fewer tokens than channels.
    output = pseudo_solved(core, image) if bool(failed) else torch.cholesky_solve(image, root)
    return Narrowing((kept,) * len(weights.inputs), output.T)


def pseudo_solved(moment: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """`moment^+ image`, for a second moment that is singular.

    Raises:
        NumericalError: It holds NaN or infinity.
    """
    check_finite("second moment", moment)
    inverse: torch.Tensor = torch.linalg.pinv(moment, rtol=1e-10, hermitian=True)
    return inverse @ image


def narrowed(model: nn.Module, block: FeedForward, narrowing: Narrowing) -> dict[str, nn.Module]:
    """The block's layers after a narrowing, by name; the model itself is not touched."""
    weights = channel_weights(model, block)
    layers: dict[str, nn.Module] = {}
    for name, gather, rows, bias in zip(
        block.inputs, narrowing.gather, weights.inputs, weights.biases, strict=True
    ):
        less = None if bias is None else _gathered(gather, bias)
        layers[name] = _narrow_layer(model.get_submodule(name), _gathered(gather, rows), less)
    last = model.get_submodule(block.output)
    bias = cast("torch.Tensor | None", last.bias)
    return layers | {block.output: _narrow_layer(last, narrowing.output, bias)}


def _gathered(gather: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values[gather] if gather.ndim == 1 else gather @ values


def _narrow_layer(
    source: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None
) -> NarrowedLinear:
    rows, columns = weight.shape
    layer = NarrowedLinear(
        columns,
        rows,
        bias is not None,
        dense_shape=linear_shape(source),
        conv1d=isinstance(source, Conv1D),
        device="meta",
        dtype=cast(torch.Tensor, source.weight).dtype,
    )
    return filled(layer, source, weight, bias)


@torch.no_grad()
def filled(
    layer: Linear, source: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None
) -> Linear:
    """A layer on the meta device with a weight and a bias, on a source's device and in its mode.

    Args:
        layer: The layer; on meta it took no random start, so the random state is left alone.
        source: The layer that it will replace.
        weight: Shape (out_features, in_features).
        bias: Shape (out_features,), or None.
    """
    old = cast(torch.Tensor, source.weight)
    layer = layer.to_empty(device=old.device)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(old.requires_grad)
    return layer.train(source.training)

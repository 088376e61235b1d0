"""Feed-forwards of a model, and narrower layers in their place.

A feed-forward is `y = W_out a(W_in x)`, or `y = W_out (a(W_gate x) * W_up x)`; its channels are the
entries between. Whatever a system does to them, pruning or merging, is a pair of linear maps: each
layer into the channels is multiplied by (k, n) from the left, the layer out of them by (n, k) from
the right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.targets import linear_weight

# Layers into the channels, and the layer out of them, below one module.
_PATTERNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama and most that came after
    (("wi_0", "wi_1"), "wo"),  # T5 1.1
    (("wi",), "wo"),  # T5
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # OPT
    (("intermediate.dense",), "output.dense"),  # BERT
)


@dataclass(frozen=True)
class FeedForward:
    """Names of a feed-forward's layers.

    Attributes:
        inputs: Layers into the channels: gate and up, or a single one.
        output: The layer out of them.
    """

    inputs: tuple[str, ...]
    output: str

    @property
    def names(self) -> tuple[str, ...]:
        """All its layers."""
        return (*self.inputs, self.output)


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
        gather: For each layer into the channels, shape (k, n): `W' = gather W`, `b' = gather b`.
        spread: Shape (n, k): `W_out' = W_out spread`.
    """

    gather: tuple[torch.Tensor, ...]
    spread: torch.Tensor


def find_feed_forwards(model: nn.Module, targets: Iterable[str]) -> list[FeedForward]:
    """The feed-forwards whose layers are all targeted, in the model's order.

    Raises:
        TargetError: There is none of a known kind.
    """
    names = set(targets)
    found = []
    for parent, _ in model.named_modules():
        for inputs, output in _PATTERNS:
            full = tuple(f"{parent}.{name}".lstrip(".") for name in (*inputs, output))
            if names.issuperset(full):
                found.append(FeedForward(full[:-1], full[-1]))
                break
    if not found:
        known = "; ".join(f"{', '.join(inputs)} and {output}" for inputs, output in _PATTERNS)
        raise TargetError(
            f"{type(model).__name__} has no feed-forward of a known kind among its targeted layers "
            f"({known}); structured systems can't narrow it."
        )
    return found


def channel_weights(model: nn.Module, block: FeedForward) -> ChannelWeights:
    """The block's weights, always as (out_features, in_features)."""
    layers = [model.get_submodule(name) for name in block.inputs]
    biases = [cast("torch.Tensor | None", layer.bias) for layer in layers]
    return ChannelWeights(
        tuple(linear_weight(layer).double() for layer in layers),
        tuple(None if bias is None else bias.detach().double() for bias in biases),
        linear_weight(model.get_submodule(block.output)).double(),
    )


def num_kept(channels: int, param_ratio: float) -> int:
    """How many of a feed-forward's channels a size leaves: all its layers shrink with them.

    Raises:
        ConfigError: Not even one.
    """
    kept = math.floor(param_ratio * channels + 1e-9)
    if kept < 1:
        raise ConfigError(
            f"param_ratio {param_ratio} leaves none of {channels} channels; raise it to "
            f"{1 / channels:.3g} or more."
        )
    return kept


def selection(kept: torch.Tensor, weights: ChannelWeights) -> Narrowing:
    """Keeps channels as they are and drops the others.

    Args:
        kept: Indices, shape (k,).
        weights: The feed-forward's weights.
    """
    identity = torch.eye(weights.output.shape[1]).to(weights.output)
    return Narrowing((identity[kept],) * len(weights.inputs), identity[:, kept])


def narrowed(model: nn.Module, block: FeedForward, narrowing: Narrowing) -> dict[str, nn.Module]:
    """The block's layers after a narrowing, by name; the model itself is not touched."""
    weights = channel_weights(model, block)
    layers: dict[str, nn.Module] = {}
    for name, gather, rows, bias in zip(
        block.inputs, narrowing.gather, weights.inputs, weights.biases, strict=True
    ):
        less = None if bias is None else gather @ bias
        layers[name] = linear_like(model.get_submodule(name), gather @ rows, less)
    last = model.get_submodule(block.output)
    layers[block.output] = linear_like(
        last, weights.output @ narrowing.spread, cast("torch.Tensor | None", last.bias)
    )
    return layers


@torch.no_grad()
def linear_like(source: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """An `nn.Linear` of a source's dtype, device and mode, with another weight and bias.

    Args:
        source: The layer that it will replace, `nn.Linear` or `Conv1D`.
        weight: Shape (out_features, in_features).
        bias: Shape (out_features,), or None.
    """
    old = cast(torch.Tensor, source.weight)
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=old.dtype)
    layer = layer.to_empty(device=old.device)  # no random start: the random state is left alone
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(old.requires_grad)
    return layer.train(source.training)

"""The arithmetic of merged layers whose parts are stored in several forms.

First factors that read the input as it is, dense weights among them, are stacked into one product;
each second factor is a product of its own. A block-diagonal second product would be one call, but
compute what the low rank saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hf_lowrank.format.forms.compact import check_order, with_units
from hf_lowrank.format.torchao_weights import NUMBERS, SCALE, dequantized
from hf_lowrank.serving.vllm.shards import Shard


class Share(NamedTuple):
    """What a rank computes of a layer: `y = (z, C z)[outputs]`, `z = F x`, or `C z` alone.

    Attributes:
        first: F, (k, n), or (k, n - k) with `inputs`; a dense weight (m, n) without a second.
        second: C, or None for a dense layer.
        inputs: The inputs in the order k pivots p, rest: `z = x[p] + F x[rest]`.
        outputs: For each output its place in (z, C z); None for `y = C z`.
    """

    first: torch.Tensor
    second: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    @property
    def numel(self) -> int:
        """Weights that are read for each token."""
        return self.first.numel() + (0 if self.second is None else self.second.numel())

    def multiplied_out(self) -> Share:
        """The same as one dense weight, computed in fp32."""
        if self.second is None:
            return self
        order = self.outputs if self.inputs is None else self.inputs
        left, right = self.second.float(), self.first.float()
        if order is not None:
            left, right = with_units(left, right, order, self.inputs is not None)
        return Share((left @ right).to(self.first.dtype))


def rank_share(shard: Shard, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Share:
    """The rank's share of a layer, as few weights as it takes.

    Pivots lie among all inputs or all outputs, so a compact layer that is spread along the axis of
    its pivots is two plain factors on each rank. Spreading leaves one factor whole on every rank:
    where a share then has no fewer weights than the dense layer's, it is multiplied out.

    Args:
        shard: What the layer is.
        tensors: What the file holds of it, whole, or cut by `cut`.
        dtype: The model's.

    Raises:
        CheckpointError: The order of a compact layer is none.
    """
    if not shard.rank:
        return Share(_weight(shard, "", tensors, dtype))
    first, second = (_weight(shard, f"lowrank_{x}.", tensors, dtype) for x in "AB")
    if shard.form == "compact":
        share = _compact(shard, first, second, tensors["lowrank_order"])
    else:
        share = Share(first, second)
    rows, columns = shard.shape
    return share if share.numel < rows * columns else share.multiplied_out()


def cut(shard: Shard, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the rank's part of a weight or bias, for what can be cut before all are there."""
    spans_outputs = name in ("weight", "lowrank_B.weight") or name.endswith("bias")
    spans_inputs = name in ("weight", "lowrank_A.weight")
    if shard.form == "compact" and name.endswith(".weight"):
        spans_outputs, spans_inputs = (
            spans_outputs and shard.by_inputs,
            spans_inputs and not shard.by_inputs,
        )
    tensor = shard.rows(tensor) if spans_outputs else tensor
    return shard.columns(tensor) if spans_inputs else tensor.clone()


def _weight(
    shard: Shard, stem: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """A factor's or a dense layer's weight, cut to the rank."""
    if f"{stem}weight" in tensors:
        return tensors[f"{stem}weight"]
    numbers, scale = tensors[stem + NUMBERS], tensors[stem + SCALE]
    columns = _num_columns(shard, stem)
    return cut(shard, f"{stem}weight", dequantized(numbers, scale, columns).to(dtype))


def _num_columns(shard: Shard, stem: str) -> int:
    """Of a whole weight, which packed numbers do not tell."""
    if stem == "lowrank_B.":
        return shard.rank
    pivots = shard.rank if shard.form == "compact" and shard.by_inputs else 0
    return shard.inputs.size - pivots


def _compact(shard: Shard, first: torch.Tensor, second: torch.Tensor, order: torch.Tensor) -> Share:
    check_order(shard.name, order)
    whole = (sum(part.size for part in shard.outputs), shard.inputs.size)
    if shard.by_inputs:
        if shard.shape[1] == whole[1]:
            return Share(first, second, inputs=order)
        return Share(shard.columns(with_units(second, first, order, True)[1]), second)
    if shard.shape[0] == whole[0]:
        return Share(first, second, outputs=order)
    return Share(first, shard.rows(with_units(second, first, order, False)[0]))


class StackedProducts(nn.Module):
    """Several layers that read the same input, their outputs side by side.

    Args:
        shares: The layers, in the order of their outputs.
        product: Makes a module that multiplies its input's last axis with a weight (out, in).
    """

    places: torch.Tensor | None

    def __init__(
        self, shares: Sequence[Share], product: Callable[[torch.Tensor], nn.Module]
    ) -> None:
        super().__init__()
        plain = [share.first for share in shares if share.inputs is None]
        self.first = product(torch.cat(plain)) if plain else None
        self.layers = nn.ModuleList()
        start = 0
        for share in shares:
            length = len(share.first) if share.inputs is None else 0
            self.layers.append(_Layer(share, slice(start, start + length), product))
            start += length
        places: list[torch.Tensor] = []
        for share in shares:
            places.append(_places(share) + sum(map(len, places)))
        reorders = any(share.outputs is not None for share in shares)
        self.register_buffer("places", torch.cat(places) if reorders else None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layers to an input of shape (..., n); returns shape (..., sum of m)."""
        stacked = x if self.first is None else self.first(x)
        outputs = [each for layer in self.layers for each in layer(x, stacked)]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return joined if self.places is None else joined.index_select(-1, self.places)


def _places(share: Share) -> torch.Tensor:
    """For each output of a layer its place in what the layer computes."""
    if share.outputs is not None:
        return share.outputs.int()
    rows = len(share.first if share.second is None else share.second)
    return torch.arange(rows, dtype=torch.int32, device=share.first.device)


class _Layer(nn.Module):
    """What is left of a layer behind the stacked product.

    Args:
        share: The layer.
        part: Its part of the stacked product's outputs; of no length where it reads pivots.
        product: See `StackedProducts`.
    """

    pivots: torch.Tensor | None
    rest: torch.Tensor

    def __init__(
        self, share: Share, part: slice, product: Callable[[torch.Tensor], nn.Module]
    ) -> None:
        super().__init__()
        self.part = part
        self.keeps_first = share.second is None or share.outputs is not None
        self.second = None if share.second is None else product(share.second)
        self.register_buffer("pivots", None, persistent=False)
        if share.inputs is not None:
            rank = len(share.first)
            self.first = product(share.first)
            self.register_buffer("pivots", share.inputs[:rank].clone(), persistent=False)
            self.register_buffer("rest", share.inputs[rank:].clone(), persistent=False)

    def forward(self, x: torch.Tensor, stacked: torch.Tensor) -> list[torch.Tensor]:
        """(z, C z), or one of them, from the layer's input and the stacked product's output."""
        inner = stacked[..., self.part]
        if self.pivots is not None:
            inner = x.index_select(-1, self.pivots) + self.first(x.index_select(-1, self.rest))
        kept = [inner] if self.keeps_first else []
        return kept if self.second is None else [*kept, self.second(inner)]

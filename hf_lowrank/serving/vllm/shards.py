"""Which part of a checkpoint's layers a rank of an engine holds: plain data and slices.

vLLM merges layers that read the same input (q, k, v; gate, up) and spreads each over its ranks:
by outputs ("column parallel") or by inputs ("row parallel"). Here every layer of the checkpoint
inside a merged layer is a `Shard` with a stored form of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.forms.stored_form import listed_layers, stored_tensors
from hf_lowrank.format.layout import Layout

# Names that classes with another head put in front (docs/format.md).
_PREFIXES = ("model.", "transformer.")


@dataclass(frozen=True)
class Stretch:
    """What a rank holds of an axis.

    Attributes:
        size: Of the whole axis.
        start: Where the rank's part starts.
        length: Of the rank's part.
    """

    size: int
    start: int
    length: int

    def narrowed(self, name: str, channels: int) -> Stretch:
        """The rank's part of what channels are left of the axis: nearly equal parts.

        Raises:
            CheckpointError: There are fewer channels than ranks.
        """
        ranks, rank = self.size // self.length, self.start // self.length
        if channels < ranks:
            raise CheckpointError(
                f"{name}: its {channels} channels cannot be spread over {ranks} ranks; lower "
                "tensor_parallel_size."
            )
        start, end = (each * channels // ranks for each in (rank, rank + 1))
        return Stretch(channels, start, end - start)


@dataclass(frozen=True)
class Shard:
    """A layer of the checkpoint inside a layer of the engine.

    Attributes:
        name: Its name in config.json, or in the engine where it is dense.
        form: Its stored form's name, "dense" for none.
        rank: Its rank, 0 for none.
        tensors: Shapes of what the file holds of it, by the ends of their names; with the bias.
        outputs: The rank's stretches of its outputs: one, or several where layers were merged in
            the checkpoint already (Phi-3).
        inputs: The rank's stretch of its inputs.
    """

    name: str
    form: str
    rank: int
    tensors: dict[str, tuple[int, ...]]
    outputs: tuple[Stretch, ...]
    inputs: Stretch

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of what the rank holds."""
        return sum(part.length for part in self.outputs), self.inputs.length

    @property
    def by_inputs(self) -> bool:
        """Whether the pivots of a compact form are inputs; see `CompactLinear`."""
        return sum(part.size for part in self.outputs) >= self.inputs.size

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the rank's outputs along the first axis."""
        starts, start = [], 0
        for part in self.outputs:
            starts.append(start + part.start)
            start += part.size
        parts = zip(starts, self.outputs, strict=True)
        return torch.cat([tensor[first : first + part.length] for first, part in parts])

    def columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the rank's inputs along the second axis."""
        first = self.inputs.start
        return tensor[:, first : first + self.inputs.length].clone()


class ListedLayers:
    """The compressed layers of a config.json, as an engine asks for them by its own names.

    Attributes:
        unclaimed: Names that the engine has not asked for yet.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._entries = {name: (form, entry) for name, form, entry in listed_layers(layout)}
        self.unclaimed = set(self._entries)

    def find(self, name: str) -> str | None:
        """The listed name of a layer, maybe from a class with another head."""
        spelled = (
            name,
            *(name.removeprefix(each) for each in _PREFIXES),
            *(each + name for each in _PREFIXES),
        )
        return next((each for each in spelled if each in self._entries), None)

    def below(self, name: str) -> str | None:
        """A listed layer with this name or inside a module with it."""
        inside = (each for each in sorted(self._entries) if each.startswith(f"{name}."))
        return self.find(name) or next(inside, None)

    def shards(
        self, names: Sequence[str], outputs: Sequence[Stretch], inputs: Stretch, has_bias: bool
    ) -> list[Shard]:
        """The shards of an engine's layer.

        Args:
            names: Its layers' names in the checkpoint: one for each output stretch, or a single
                one for all.
            outputs: The rank's stretch of each layer's outputs, dense.
            inputs: The rank's stretch of the inputs, dense.
            has_bias: Whether the layer has a bias.

        Raises:
            CheckpointError: The layers do not fit together, or cannot be spread over the ranks.
        """
        groups = [tuple(outputs)] if len(names) == 1 else [(part,) for part in outputs]
        found = [
            self._shard(name, group, inputs, has_bias)
            for name, group in zip(names, groups, strict=True)
        ]
        for shard in found:
            if shard.inputs != found[0].inputs:
                raise CheckpointError(
                    f"{shard.name} reads {shard.inputs.size} inputs, {found[0].name} "
                    f"{found[0].inputs.size}; the checkpoint is damaged."
                )
        return found

    def _shard(
        self, name: str, outputs: tuple[Stretch, ...], inputs: Stretch, has_bias: bool
    ) -> Shard:
        listed = self.find(name)
        rows, columns = sum(part.size for part in outputs), inputs.size
        if listed is None:
            shapes: dict[str, tuple[int, ...]] = {"weight": (rows, columns)}
            shapes = _with_bias(shapes, "bias", rows, has_bias)
            return Shard(name, "dense", 0, shapes, outputs, inputs)
        self.unclaimed.discard(listed)
        form, entry = self._entries[listed]
        if form.name == "narrowed":
            (part,) = outputs  # what several layers share has no channels of its own
            outputs = (part if entry[0] == rows else part.narrowed(listed, entry[0]),)
            inputs = inputs if entry[1] == columns else inputs.narrowed(listed, entry[1])
            rows, columns = entry
        tensors = stored_tensors(listed, form, (rows, columns), entry, self._layout)
        rank = entry if form.listed_in == "ranks" else 0
        by_outputs = form.name == "compact" and rows < columns
        bias = ("lowrank_bias" if by_outputs else "lowrank_B.bias") if rank else "bias"
        shapes = _with_bias(tensors, bias, rows, has_bias)
        return Shard(listed, form.name, rank, shapes, outputs, inputs)


def _with_bias(
    tensors: dict[str, Any], name: str, rows: int, has_bias: bool
) -> dict[str, tuple[int, ...]]:
    return {**tensors, name: (rows,)} if has_bias else tensors

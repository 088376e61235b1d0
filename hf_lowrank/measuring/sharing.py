"""Layers that read the same tensor (q, k and v; gate and up): one of them collects for all."""

from __future__ import annotations

import weakref

import torch

from hf_lowrank.errors import NumericalError


class SharedInputs:
    """Finds out by identity which layers share an input.

    Attributes:
        leaders: The layer that collects a part of `Moments` for a layer, by (part, layer).
    """

    def __init__(self) -> None:
        self.leaders: dict[tuple[str, str], str] = {}
        self._seen: dict[tuple[str, int, int], tuple[weakref.ref[torch.Tensor], str]] = {}

    def start_batch(self) -> None:
        """Forgets the last batch's tensors."""
        self._seen.clear()

    def leads(self, part: str, name: str, inputs: torch.Tensor) -> bool:
        """Whether this layer is the first of the batch to collect this part of this very tensor."""
        key = (part, id(inputs), inputs._version)  # another version after a write in place
        known = self._seen.get(key)
        leader = name if known is None or known[0]() is not inputs else known[1]
        self._seen[key] = (weakref.ref(inputs), leader)
        before = self.leaders.setdefault((part, name), leader)
        if before != leader:
            raise NumericalError(
                f"{name}: shared its input with {before} in one batch and with {leader} in "
                "another; exclude the layer."
            )
        return leader == name

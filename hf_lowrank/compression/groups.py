"""Layers whose moments are in memory together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.feed_forward import FeedForward

BYTES_PER_MOMENT = 4
Layer = TypeVar("Layer")
SECOND_MOMENTS = frozenset({"input", "input_centred", "output"})


@dataclass(frozen=True)
class Group:
    """Layers whose moments are in memory together.

    Attributes:
        layers: Layers by name.
        blocks: Feed-forwards whose output layer is among them and whose channels are ordered.
        needs: Names of the `Moments` fields to collect.
    """

    layers: Mapping[str, nn.Module]
    blocks: Sequence[FeedForward]
    needs: frozenset[str]

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return list(self.layers)

    @property
    def whole(self) -> list[str]:
        """Layers whose whole input moment is needed, for the channels' order."""
        return [block.output for block in self.blocks]


def moment_groups(
    targets: Mapping[str, nn.Module],
    needs: frozenset[str],
    moment_gib: float,
    whole: Sequence[str] = (),
) -> list[dict[str, nn.Module]]:
    """Consecutive layers whose moments fit into memory together; at least one layer each."""

    def numbers(name: str, layer: nn.Module) -> int:
        rows, columns = linear_shape(layer)
        return (
            len(needs & SECOND_MOMENTS) * min(rows, columns) ** 2
            + ("gradient" in needs) * rows * columns
            + 2 * (name in whole) * columns**2  # one stays with the channels' order
        )

    return grouped(targets, numbers, moment_gib) or [{}]


def grouped(
    layers: Mapping[str, Layer], numbers: Callable[[str, Layer], int], moment_gib: float
) -> list[dict[str, Layer]]:
    """Consecutive layers whose moments fit into memory together; at least one layer each.

    Args:
        layers: Layers by name.
        numbers: How many fp32 numbers the moments of a layer hold.
        moment_gib: Memory for those of a group, GiB.
    """
    groups: list[dict[str, Layer]] = []
    used = 0.0
    for name, layer in layers.items():
        size = BYTES_PER_MOMENT * numbers(name, layer)
        if not groups or used + size > moment_gib * 2**30:
            groups.append({})
            used = 0.0
        groups[-1][name] = layer
        used += size
    return groups

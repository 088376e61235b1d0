"""Layers whose moments are in memory together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.feed_forward import FeedForward

BYTES_PER_MOMENT = 4
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
    limit = moment_gib * 2**30
    groups: list[dict[str, nn.Module]] = [{}]
    used = 0.0
    for name, layer in targets.items():
        rows, columns = linear_shape(layer)
        size = BYTES_PER_MOMENT * (
            len(needs & SECOND_MOMENTS) * min(rows, columns) ** 2
            + ("gradient" in needs) * rows * columns
            + 2 * (name in whole) * columns**2  # one stays with the channels' order
        )
        if groups[-1] and used + size > limit:
            groups.append({})
            used = 0.0
        groups[-1][name] = layer
        used += size
    return groups

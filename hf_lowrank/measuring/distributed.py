"""Work shared over the processes of `accelerate launch`: sums, shares, one decision for all.

Every function is a plain local one when there is a single process, and a collective one
otherwise: then all processes have to call it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hf_lowrank.decomposition.moments import Moments, SecondMoment

Item = TypeVar("Item")
Key = TypeVar("Key")
_SECOND = ("input", "input_whole", "input_centred", "output")
_TENSORS = (*_SECOND, "input_abs", "gradient_rows", "gradient")


@dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    Attributes:
        index: Its number, from 0.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `count`-th item from `index` on: this process's part of the work."""
        return items[self.index :: self.count]

    def owns(self, position: int) -> bool:
        """Whether `share` holds the item at this position."""
        return position % self.count == self.index

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def decide(self, value: Item) -> Item:
        """The main process's value, on every process."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def merge(self, part: Mapping[Key, Item]) -> dict[Key, Item]:
        """The union of all processes' dictionaries, in the order of the processes."""
        if self.count == 1:
            return dict(part)
        merged: dict[Key, Item] = {}
        for found in gather_object([dict(part)]):
            merged |= found
        return merged


ALONE = Processes()


def current_processes() -> Processes:
    """This process among those of `accelerate launch` or `torchrun`; joins them if need be."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 and not dist.is_initialized():
        return ALONE
    # Unless it is told of the CPU, accelerate takes processes without a device for single ones.
    devices = getattr(torch, "accelerator", torch.cuda)  # before torch 2.6 there is none
    state: Any = PartialState(cpu=not devices.is_available())
    return Processes(state.process_index, state.num_processes)


def sum_moments(
    moments: Mapping[str, Moments], device: torch.device, processes: Processes
) -> dict[str, Moments]:
    """Moments summed over all processes, whatever part of the batches each of them saw.

    Args:
        moments: This process's sums by layer; a layer that it did not reach has none.
        device: Where the collective operations run.
        processes: Those that take part.
    """
    if processes.count == 1:
        return dict(moments)
    layout: dict[str, Any] = {}
    for found in gather_object([{name: _layout(moment) for name, moment in moments.items()}]):
        for name, parts in found.items():
            layout.setdefault(name, {}).update(parts)
    summed = {}
    for name, parts in layout.items():
        mine = moments.get(name, Moments())
        counts = torch.tensor([mine.tokens, mine.losses], dtype=torch.int64, device=device)
        dist.all_reduce(counts)
        result = Moments(tokens=int(counts[0]), losses=int(counts[1]))
        sums = [mine.strength or 0.0, float(mine.strength is not None)]
        strength = torch.tensor(sums, dtype=torch.float64, device=device)
        dist.all_reduce(strength)
        result.strength = float(strength[0]) if bool(strength[1]) else None
        for part, (shape, size) in parts.items():
            setattr(result, part, _sum_part(getattr(mine, part), shape, size, device))
        summed[name] = result
    return summed


def _layout(moment: Moments) -> dict[str, tuple[tuple[int, ...], int]]:
    """(shape, length of the vectors) of each part that is there."""
    found = {}
    for part in _TENSORS:
        value = getattr(moment, part)
        if isinstance(value, SecondMoment):
            found[part] = (tuple(value.matrix.shape), value.size)
        elif value is not None:
            found[part] = (tuple(value.shape), 0)
    return found


def _sum_part(
    value: SecondMoment | torch.Tensor | None,
    shape: tuple[int, ...],
    size: int,
    device: torch.device,
) -> SecondMoment | torch.Tensor:
    matrix = value.matrix if isinstance(value, SecondMoment) else value
    total = torch.zeros(shape, device=device) if matrix is None else matrix.clone()
    dist.all_reduce(total)
    if not size:
        return total
    squares = value.squares if isinstance(value, SecondMoment) else 0.0
    square = torch.tensor([squares], dtype=torch.float64, device=device)
    dist.all_reduce(square)
    return SecondMoment(total, float(square), size)

"""Hidden states of a set of batches at the inputs of blocks, on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.compression.cache import read_stored, write_stored
from hf_lowrank.compression.streaming.calls import Call
from hf_lowrank.errors import StorageError

DENSE = "dense"


class States:
    """The hidden states of some batches under a plan, a file for each batch and level.

    Level i is the input of block i, the last one the output of the last block. Up to the first
    block that a plan changes they are those of the dense model.

    Args:
        folder: Of the set of batches.
        key: Tells plans apart; `DENSE` for the dense model.
        count: How many batches.
        first: The first block that the plan changes.
    """

    def __init__(self, folder: Path, key: str, count: int, first: int = 0) -> None:
        self.folder, self.key, self.count, self.first = folder, key, count, first

    def place(self, level: int) -> Path:
        """Folder of a level."""
        key = DENSE if level <= self.first else self.key
        return self.folder / key / f"{level:04}"

    def has(self, level: int, number: int) -> bool:
        """Whether a batch's states are there."""
        return (self.place(level) / f"{number}.pt").exists()

    def is_complete(self, level: int) -> bool:
        """Whether the states of all batches are there."""
        return all(self.has(level, number) for number in range(self.count))

    def read(self, level: int, number: int, device: torch.device) -> torch.Tensor:
        """The states of a batch, shape as the model has them."""
        found: torch.Tensor = needed(self.place(level) / f"{number}.pt")
        return found.to(device)

    def write(self, level: int, number: int, hidden: torch.Tensor) -> None:
        """Keeps the states of a batch."""
        write_stored(self.place(level) / f"{number}.pt", hidden.detach().cpu().clone())

    def drop(self, level: int) -> None:
        """Removes a level that is not the start of other plans, too."""
        if level > self.first:
            shutil.rmtree(self.place(level), ignore_errors=True)

    def call(self, number: int, block: int) -> Call:
        """How the model calls a block for a batch."""
        args, kwargs = needed(self._calls(number), mapped=True)[block]
        return Call(args, kwargs)

    def has_calls(self, number: int) -> bool:
        """Whether a batch's calls and its states at the first block are there."""
        return self._calls(number).exists() and self.has(0, number)

    def keep_calls(self, number: int, calls: list[Call]) -> None:
        """Keeps how the model calls its blocks for a batch; tensors that they share once."""
        write_stored(self._calls(number), [(call.args, call.kwargs) for call in calls])

    def _calls(self, number: int) -> Path:
        return self.folder / "calls" / f"{number}.pt"


def needed(path: Path, *, mapped: bool = False) -> Any:  # noqa: ANN401
    """What lies in a file of this run.

    Raises:
        StorageError: It is gone, or damaged.
    """
    found = read_stored(path, mapped=mapped)
    if found is None:
        raise StorageError(f"{path}: can't be read; remove the folder {path.parent} and run again.")
    return found

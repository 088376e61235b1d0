"""What a piece of work costs: seconds, passes over sequences, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass
class Cost:
    """Filled when the block of `counted` ends.

    Attributes:
        seconds: Wall time.
        forwards: Sequences that went forward through the model.
        backwards: Those that went forward with gradients on, and so also backward.
        peak_mib: Largest memory of the process (or of the GPU's tensors) since the block began,
            MiB; since the process began where the system keeps no other figure.
    """

    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    peak_mib: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """One piece of work after the other."""
        return Cost(
            self.seconds + other.seconds,
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            max(self.peak_mib, other.peak_mib),
        )


@contextmanager
def counted(model: nn.Module) -> Iterator[Cost]:
    """Counts what happens to a model in the block; its layers may be swapped in between."""
    cost = Cost()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        size = next((len(v) for v in values if isinstance(v, torch.Tensor)), 0)
        cost.forwards += size
        cost.backwards += size * torch.is_grad_enabled()

    body = getattr(model, "base_model", model)
    handle = body.register_forward_pre_hook(count, with_kwargs=True)
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_peak()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        handle.remove()
        cost.seconds = time.perf_counter() - start
        cost.peak_mib = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _peak_mib()


def _reset_peak() -> None:
    """Linux forgets the peak of a process when 5 is written here; elsewhere nothing happens."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak_mib() -> float:
    try:
        lines = Path("/proc/self/status").read_text("ascii").split("\n")
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

"""What a piece of work costs: seconds, passes over sequences, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


@dataclass
class Cost:
    """Filled when the block of `counted` or `counted_everywhere` ends.

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
        _add_pass(cost, args, kwargs)

    body = getattr(model, "base_model", model)
    handle = body.register_forward_pre_hook(count, with_kwargs=True)
    with _measured(cost, [handle], on_gpu=next(model.parameters()).is_cuda):
        yield cost


@contextmanager
def counted_everywhere() -> Iterator[Cost]:
    """Counts what happens to all transformers models in the block, also to those made in it.

    A pass is the outermost call of a `PreTrainedModel`: those that it makes of its parts are not
    counted again, under whatever wrapper or autocast it runs. A call that raises is not counted.
    """
    cost = Cost()
    outermost: nn.Module | None = None

    def enter(module: nn.Module, args: Any) -> None:  # noqa: ANN401
        nonlocal outermost
        if outermost is None and isinstance(module, PreTrainedModel):
            outermost = module

    # Only the hooks after a call are given its keyword arguments.
    def leave(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> None:
        nonlocal outermost
        if module is outermost:
            outermost = None
            _add_pass(cost, args, kwargs)

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, with_kwargs=True),
    ]
    try:
        with _measured(cost, handles, on_gpu=torch.cuda.is_available()):
            yield cost
    finally:  # torch forgets that entry, and torch.compile then warns of a global hook
        _global_forward_hooks_with_kwargs.pop(handles[1].id, None)


def _add_pass(cost: Cost, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    values = [*args, *kwargs.values()]
    size = next((len(v) for v in values if isinstance(v, torch.Tensor)), 0)
    cost.forwards += size
    cost.backwards += size * torch.is_grad_enabled()


@contextmanager
def _measured(cost: Cost, handles: Sequence[RemovableHandle], on_gpu: bool) -> Iterator[None]:
    """Fills in seconds and memory when the block ends, and removes the hooks."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_peak()
    start = time.perf_counter()
    try:
        yield
    finally:
        for handle in handles:
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

"""Batches through a model: one after the other, or block by block where its blocks lie on disk."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.measuring.items import Batch, device_of, eval_mode
from hf_lowrank.measuring.progress import track
from hf_lowrank.ranks.plan import RankPlan

Result = TypeVar("Result")
Compute = Callable[[nn.Module, Batch], Result]


class Stream(ABC):
    """How a model is run and cut whose blocks are in memory one at a time."""

    @abstractmethod
    def passes(
        self, batches: Sequence[Batch], compute: Compute[Result], progress: str | None
    ) -> Iterator[Result]:
        """See `each_batch`: all batches through each block in turn."""

    @abstractmethod
    def cut(
        self,
        factors: Mapping[str, Factors],
        plan: RankPlan,
        orders: Mapping[str, Any],  # channel orders, which this folder knows nothing of
    ) -> AbstractContextManager[None]:
        """Has a plan in force in all passes within the block; see `factorize_`."""


_STREAMS: weakref.WeakKeyDictionary[nn.Module, Stream] = weakref.WeakKeyDictionary()


def stream_of(model: nn.Module) -> Stream | None:
    """The stream that feeds a model its blocks; None where all of the model is in memory."""
    return _STREAMS.get(model)


def feed(model: nn.Module, stream: Stream) -> None:
    """Makes a stream known as what feeds a model its blocks."""
    _STREAMS[model] = stream


def each_batch(
    model: nn.Module,
    batches: Sequence[Batch],
    compute: Compute[Result],
    progress: str | None = None,
) -> Iterator[Result]:
    """What a function makes of a model and each batch, in eval mode and without gradients.

    Args:
        model: The model.
        batches: Forward inputs, on any device.
        compute: Called once for each batch, in their order.
        progress: Name of the phase for `track`, or None to show nothing.
    """
    stream = stream_of(model)
    if stream is not None:
        yield from stream.passes(batches, compute, progress)
        return
    device = device_of(model)
    with eval_mode(model):
        for batch in track(batches, progress):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.no_grad():
                result = compute(model, inputs)
            yield result

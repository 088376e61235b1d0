"""How a model calls its blocks, caught from its own forward pass and made again later.

So no architecture is written by hand: masks, positions and whatever else a block is given are what
the model itself gives it. The hidden states have to go from block to block unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lowrank.errors import TargetError

_PLAIN = (torch.Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
_HIDDEN = "hidden_states"


class AllCaught(Exception):  # noqa: N818 (no error, but a way out)
    """The last block was called; what the model does after it does not matter."""


@dataclass(frozen=True)
class Call:
    """The arguments of a block, with None in place of the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that a block makes of others."""
        args, kwargs = _moved(self.args, hidden.device), _moved(self.kwargs, hidden.device)
        if args:
            output = block(hidden, *args[1:], **kwargs)
        else:
            output = block(**kwargs | {_HIDDEN: hidden})
        return hidden_of(output)


def hidden_of(output: Any) -> torch.Tensor:  # noqa: ANN401
    """The hidden states in what a block returns."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


class CallRecorder:
    """Notes each block's arguments while a model runs, and stops it at the last block.

    Args:
        model: The model, for messages.
        count: How many blocks it has.
        pass_on: What a block returns to hand on hidden states, by its index.
    """

    def __init__(
        self, model: nn.Module, count: int, pass_on: Callable[[int, torch.Tensor], Any]
    ) -> None:
        self.name, self.count, self.pass_on = type(model).__name__, count, pass_on
        self.calls: list[Call] = []
        self.hidden: torch.Tensor | None = None

    def __call__(self, index: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Stands in for a block's forward pass.

        Raises:
            AllCaught: This is the last block.
            TargetError: The blocks are no plain chain, or take what can't lie on disk.
        """
        hidden = args[0] if args else kwargs.get(_HIDDEN)
        if index != len(self.calls) or not isinstance(hidden, torch.Tensor):
            raise self._refusal(f"does not call its block {len(self.calls)} with hidden states")
        if self.hidden is not None and hidden is not self.hidden:
            raise self._refusal(f"changes the hidden states before its block {index}")
        self.hidden = hidden
        call = Call((None, *args[1:]) if args else (), kwargs | ({} if args else {_HIDDEN: None}))
        for name, value in [*enumerate(call.args), *call.kwargs.items()]:
            if not _is_plain(value):
                raise self._refusal(f"gives its blocks {name} as a {type(value).__name__}")
        self.calls.append(call)
        if len(self.calls) == self.count:
            raise AllCaught
        return self.pass_on(index, hidden)

    def _refusal(self, what: str) -> TargetError:
        return TargetError(
            f"{self.name}: can't be compressed block by block, it {what}; compress it in memory."
        )

    def check(self) -> None:
        """Refuses a model that left blocks out.

        Raises:
            TargetError: With the number of blocks that were called.
        """
        if len(self.calls) < self.count:
            raise self._refusal(f"calls {len(self.calls)} of its {self.count} blocks")


def _is_plain(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(each, device) for each in value)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return value

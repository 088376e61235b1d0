"""How a model uses its layers in one pass: who is called, and by whom weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from hf_lowrank.format.weight_stand_in import METADATA
from hf_lowrank.measuring.hooks import watched


class Watch(TorchFunctionMode):
    """Notes how a model uses layers: who is called, by whom weights are read, where gradients go.

    Every function of torch that gets a tensor passes through here, so that reading a weight shows
    whichever way the model's code comes by it. Asking for its shape or type is no reading.
    """

    def __init__(self, layers: Mapping[str, nn.Module], needs_gradient: bool) -> None:
        super().__init__()
        self.layers = layers
        self.needs_gradient = needs_gradient
        self.owners = {id(layer.weight): name for name, layer in layers.items()}
        self.running: set[str] = set()
        self.called: set[str] = set()
        self.read: set[str] = set()
        self.reached: set[str] = set()
        self.by_keyword: set[str] = set()
        self.different: set[str] = set()

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Notes the weights among the arguments, and calls the function."""
        kwargs = kwargs or {}
        if func not in METADATA:
            self._note([*args, *kwargs.values()])
        return func(*args, **kwargs)

    def _note(self, values: Any) -> None:  # noqa: ANN401
        for value in values:
            if isinstance(value, (list, tuple)):
                self._note(value)
            elif (name := self.owners.get(id(value))) is not None and name not in self.running:
                self.read.add(name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watches for the time of the block."""
        handles = []
        for name, layer in self.layers.items():
            handles += [
                layer.register_forward_pre_hook(partial(self._on_start, name)),
                layer.register_forward_hook(partial(self._on_end, name), with_kwargs=True),
            ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_start(self, name: str, *call: object) -> None:
        self.running.add(name)

    def _on_end(
        self,
        name: str,
        layer: nn.Module,
        args: tuple[torch.Tensor, ...],
        kwargs: dict[str, object],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        if kwargs:
            self.by_keyword.add(name)
        elif args[0].numel():
            self.called.add(name)
            if not _is_plain(layer) and not _computes_the_same(layer, args[0], output):
                self.different.add(name)
        self.running.discard(name)
        result = watched(output) if self.needs_gradient else None
        if result is not None:
            result.register_hook(lambda gradient: self.reached.add(name))
        return result

    def uncalled(self) -> dict[str, str]:
        """Layers that the pass left out, by name with the reason."""
        found = dict.fromkeys(self.layers, "the first batch does not call it")
        for name in self.called:
            if not self.needs_gradient or name in self.reached:
                del found[name]
            else:
                found[name] = "no gradient of the first batch's loss reaches it"
        return found

    def misused(self) -> dict[str, str]:
        """Layers that are used in another way than by a plain call, by name with the reason."""
        found = {}
        for name, layer in self.layers.items():
            kind = type(layer).__name__
            if name in self.read:
                found[name] = "other code than the layer's own reads its weight"
            elif name in self.by_keyword:
                found[name] = "it is called with keyword arguments"
            elif name in self.different:
                found[name] = f"it is a {kind} and computes something else than nn.Linear"
            elif name not in self.called and not _is_plain(layer):
                found[name] = f"it is a {kind}, which no pass showed to compute as nn.Linear"
        return found


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, Conv1D)


@torch.no_grad()
def _computes_the_same(layer: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a subclass gives what its parent would; Falcon's, for one, rounds differently."""
    parent = Conv1D if isinstance(layer, Conv1D) else nn.Linear
    expected = parent.forward(layer, inputs)  # type: ignore[arg-type]
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    tolerance = max(2 * torch.finfo(expected.dtype).eps, 1e-5)
    return bool((output - expected).float().norm() <= tolerance * expected.float().norm())

"""What a layer of fused experts computes, expert by expert, and where its router sends tokens.

transformers computes fused experts in one of several ways (a loop, grouped or batched products),
none of which shows an expert's channels. So they are computed again from what the module is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hf_lowrank.format.fused_experts import (
    ExpertsShape,
    experts_shape,
    smaller_router,
    with_tensors,
)


@dataclass(frozen=True)
class Routed:
    """Tokens with the experts that they are sent to.

    Attributes:
        tokens: Shape (tokens, hidden).
        index: Experts of each token, shape (tokens, k).
        weights: Share of each of them in the output, shape (tokens, k).
    """

    tokens: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, values: Iterable[object]) -> Routed | None:
        """What a module of experts is called with; None if it is none of the kind."""
        given = [value.detach() for value in values if isinstance(value, torch.Tensor)]
        index = [value for value in given if not value.is_floating_point()]
        floats = [value for value in given if value.is_floating_point()]
        if len(index) != 1 or len(floats) != 2 or floats[1].shape != index[0].shape:
            return None
        rows = [value.reshape(-1, value.shape[-1]) for value in (floats[0], index[0], floats[1])]
        return cls(*rows) if len({len(each) for each in rows}) == 1 else None

    def __getitem__(self, rows: torch.Tensor) -> Routed:
        """Some of the tokens."""
        return Routed(self.tokens[rows], self.index[rows], self.weights[rows])

    def shares(self, ids: torch.Tensor) -> torch.Tensor:
        """Share of each of these experts in a token's output, 0 for those that it is not sent to.

        Args:
            ids: Experts, shape (tokens, j).
        """
        same = ids[:, :, None] == self.index[:, None, :]
        return (same * self.weights[:, None, :]).sum(dim=2)


@dataclass(frozen=True)
class Experts:
    """A module of fused experts with its router.

    Attributes:
        module: The experts.
        router: Who chooses them, None where none of them can be dropped.
    """

    module: nn.Module
    router: nn.Module | None = None

    @cached_property
    def shape(self) -> ExpertsShape:
        """Their sizes."""
        shape = experts_shape(self.module)
        assert shape is not None
        return shape

    @property
    def chosen(self) -> int:
        """How many the router chooses for a token; all of them where there is no router."""
        router: Any = self.router
        return self.shape.size.experts if router is None else int(router.top_k)

    def channels(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """What the expert's output weight reads, shape (tokens, width)."""
        module: Any = self.module
        rows = self._product(self.shape.into, expert, tokens)
        return module._apply_gate(rows) if self.shape.inputs == 2 else module.act_fn(rows)  # type: ignore[no-any-return]

    def outputs(self, expert: int, channels: torch.Tensor) -> torch.Tensor:
        """The expert's output, shape (tokens, hidden), before the router's weight."""
        return self._product("down_proj", expert, channels)

    def output_weight(self, expert: int) -> torch.Tensor:
        """Shape (hidden, width)."""
        weight = self.module._parameters["down_proj"]
        assert weight is not None
        own = weight[expert].detach()
        return own.mT if self.shape.transposed else own

    def _product(self, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = (self.module._parameters.get(each) for each in (name, f"{name}_bias"))
        assert weight is not None
        found = rows @ (weight[expert] if self.shape.transposed else weight[expert].mT)
        return found if bias is None else found + bias[expert]

    def combined(self, routed: Routed) -> torch.Tensor:
        """The output of the module, expert by expert."""
        total = torch.zeros_like(routed.tokens)
        for expert in range(self.shape.size.experts):
            rows, places = torch.where(routed.index == expert)
            found = self.outputs(expert, self.channels(expert, routed.tokens[rows]))
            total.index_add_(0, rows, (found * routed.weights[rows, places, None]).to(total.dtype))
        return total

    def next_best(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The experts that would be chosen if one more were, shape (tokens, k + 1)."""
        if self.router is None or self.chosen >= self.shape.size.experts:
            return None
        return route(with_tensors(self.router, {}, top_k=self.chosen + 1), tokens).index

    def without(self, expert: int, tokens: torch.Tensor) -> Routed:
        """Where tokens are sent once an expert is gone; the others keep their numbers."""
        assert self.router is not None
        others = torch.arange(self.shape.size.experts, device=tokens.device)
        found = route(smaller_router(self.router, others[others != expert]), tokens)
        return Routed(tokens, found.index + (found.index >= expert), found.weights)


def route(router: nn.Module, tokens: torch.Tensor) -> Routed:
    """What a router says of tokens; its hooks are left alone.

    Raises:
        ValueError: It says nothing that is known.
    """
    said = type(router).forward(router, tokens)
    said = said if isinstance(said, tuple) else (said,)
    index = next((v for v in said if v.dtype in (torch.int32, torch.int64)), None)
    shares = [v for v in said if index is not None and v is not index and v.shape == index.shape]
    found = Routed.of([tokens, index, *shares[-1:]])
    if found is None:
        raise ValueError(f"{type(router).__name__} does not say which experts it chooses")
    return found

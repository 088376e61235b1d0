"""Fused experts with prices: what a layer loses with narrower or with fewer of them.

Each expert keeps its own best channels; all of a layer keep the same number, so that their tensors
stay fused. An expert that is dropped takes its row of the router along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from hf_lowrank.channels.narrowing import ChannelWeights, refit
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.format.fused_experts import ChannelView, smaller_experts, smaller_router
from hf_lowrank.ranks.plan import ExpertsPlan


@dataclass(frozen=True)
class ExpertOrder:
    """The E experts of a layer and their n channels, by price; on the CPU.

    Attributes:
        name: Name of the module of experts.
        router: Name of the router whose rows they are, None where none can be dropped.
        fewest: The smallest number of experts that may be left.
        channel_cost: Weights of one channel of one expert.
        order: Channels of each expert, those to keep first, shape (E, n).
        counts: How many are kept at each step, ascending to n.
        narrower: Predicted rise of the mean loss at each step of each expert, nats, (E, steps).
        drops: The same of each expert that is dropped, its tokens sent elsewhere, shape (E,).
        moment: Second moment of the channels, damped for the refit, shape (E, n, n), fp32.
    """

    name: str
    router: str | None
    fewest: int
    channel_cost: int
    order: torch.Tensor
    counts: list[int]
    narrower: torch.Tensor
    drops: torch.Tensor
    moment: torch.Tensor

    @property
    def dense(self) -> tuple[int, int]:
        """Experts, and channels of each."""
        return self.order.shape[0], self.order.shape[1]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(experts, width) of every way to shrink them."""
        counts = range(self.fewest, self.dense[0] + 1)
        return [(count, width) for width in self.counts for count in counts]

    @property
    def rises(self) -> torch.Tensor:
        """Predicted rise of the mean loss at each of the sizes, nats, fp64."""
        gains, _ = (self.drops[:, None] - self.narrower).sort(dim=0)  # the cheapest to drop first
        lost = self.dense[0] - torch.arange(self.fewest, self.dense[0] + 1)
        totals = torch.cat([torch.zeros_like(gains[:1]), gains.cumsum(dim=0)])[lost]
        return (totals + self.narrower.sum(dim=0)).T.flatten()

    def scaled(self, factor: float) -> ExpertOrder:
        """With all prices multiplied."""
        narrower, drops = self.narrower * factor, self.drops * factor
        return dataclasses.replace(self, narrower=narrower, drops=drops)

    def plan(self, experts: int, width: int) -> ExpertsPlan:
        """So many experts of so many channels."""
        return ExpertsPlan(experts, width, self.dense, self.channel_cost)

    def predicted_rise(self, plan: ExpertsPlan) -> float:
        """Predicted rise of the mean loss, nats; between two steps that of the smaller one."""
        if not plan.is_cut:
            return 0.0
        step = self._step(plan.width)
        kept = self.kept(plan)
        dropped = torch.ones(self.dense[0], dtype=torch.bool)
        dropped[kept] = False
        return float(self.drops[dropped].sum() + self.narrower[kept, step].sum())

    def kept(self, plan: ExpertsPlan) -> torch.Tensor:
        """The experts that stay, ascending."""
        gains = self.drops - self.narrower[:, self._step(plan.width)]
        return gains.argsort(descending=True, stable=True)[: plan.experts].sort().values

    def _step(self, width: int) -> int:
        return max(sum(each <= width for each in self.counts) - 1, 0)

    @torch.no_grad()
    def smaller(self, model: nn.Module, plan: ExpertsPlan) -> dict[str, nn.Module]:
        """The experts and their router after a cut, by name; the model itself is not touched.

        The output weight of each expert is fitted to the channels that it keeps.
        """
        module, kept = model.get_submodule(self.name), self.kept(plan)
        view = ChannelView.of(module)
        device, into, bias, out = view.out.device, [], [], []
        for expert in kept.tolist():
            channels = self.order[expert, : plan.width].sort().values.to(device)
            into.append(view.into[expert][:, channels])
            bias += [] if view.bias is None else [view.bias[expert][:, channels]]
            weights = ChannelWeights((), (), view.out[expert].double())
            is_whole = plan.width == self.dense[1]  # bitwise as before
            moment = self.moment[expert].to(device)
            out.append(
                weights.output if is_whole else refit(channels, weights, moment.double()).output
            )
        biases = torch.stack(bias) if bias else None
        tensors = ChannelView(torch.stack(into), biases, torch.stack(out)).stored(module)
        last = module._parameters.get("down_proj_bias")
        if last is not None:
            tensors["down_proj_bias"] = last.detach()[kept.to(device)]
        found = {self.name: smaller_experts(module, tensors)}
        if self.router is not None and len(kept) < self.dense[0]:
            found[self.router] = smaller_router(model.get_submodule(self.router), kept)
        return found


# By the name of a feed-forward's output layer, or of a module of experts.
Orders: TypeAlias = Mapping[str, ChannelOrder | ExpertOrder]


def of_feed_forwards(orders: Orders | None) -> dict[str, ChannelOrder]:
    """The orders of feed-forwards alone."""
    return {name: each for name, each in (orders or {}).items() if isinstance(each, ChannelOrder)}


def of_experts(orders: Orders | None) -> dict[str, ExpertOrder]:
    """The orders of fused experts alone."""
    return {name: each for name, each in (orders or {}).items() if isinstance(each, ExpertOrder)}

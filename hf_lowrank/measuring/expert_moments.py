"""Calibration of fused experts: second moments of each expert's channels and output gradients.

An expert's output enters the layer's with the router's weight w, so the gradient of the loss by it
is `g = w dL/dy`. Summed over the tokens that an expert sees:

    C = sum h h^T,    G = sum g g^T  (or that of the images W^T g, where channels are fewer),

with h its channels. An expert that sees few tokens is helped out by the layer's: by the moment of
its channels on tokens of the whole layer, and by the gradients of all experts of the layer.
See docs/methods.md, 2.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from hf_lowrank.measuring.collection import frozen, own_batches, run_batch
from hf_lowrank.measuring.distributed import ALONE, Processes
from hf_lowrank.measuring.hooks import forward_hooks, watched
from hf_lowrank.measuring.items import Batch, LossFunction, is_encoder_decoder
from hf_lowrank.measuring.masks import BatchMasks
from hf_lowrank.measuring.routing import Experts, Routed
from hf_lowrank.measuring.token_sums import unmasked_rows

_SPREAD = 4  # one token of the whole layer to so many of an expert's own, on average


@dataclass
class ExpertMoments:
    """Sums over the calibration tokens of one layer of E experts with n channels, fp32.

    Attributes:
        channels: C of each expert, shape (E, n, n).
        spread: The same over tokens of the whole layer, whoever they are sent to, (E, n, n).
        gradients: G of each expert, shape (E, s, s): of the images if n is below the hidden size.
        layer_gradients: G over all experts, shape (hidden, hidden).
        squares: Sum of |g|^2 of each expert, shape (E,).
        drops: For each expert, shape (2, E): the summed loss that its absence is predicted to
            cost, and that of a gradient of the same size in all directions. Zeros without router.
        tokens: Tokens of each expert, shape (E,).
        spread_tokens: Tokens behind `spread`, shape (E,).
        losses: Scored positions.
    """

    channels: torch.Tensor
    spread: torch.Tensor
    gradients: torch.Tensor
    layer_gradients: torch.Tensor
    squares: torch.Tensor
    drops: torch.Tensor
    tokens: torch.Tensor
    spread_tokens: torch.Tensor
    losses: int = 0

    @classmethod
    def zeros(cls, experts: Experts) -> ExpertMoments:
        """Of no token yet."""
        size, hidden = experts.shape.size, experts.shape.hidden
        zeros = partial(torch.zeros, device=experts.output_weight(0).device)
        count, width, small = size.experts, size.width, min(size.width, hidden)
        return cls(
            channels=zeros(count, width, width),
            spread=zeros(count, width, width),
            gradients=zeros(count, small, small),
            layer_gradients=zeros(hidden, hidden),
            squares=zeros(count),
            drops=zeros(2, count),
            tokens=zeros(count),
            spread_tokens=zeros(count),
        )

    def add(self, experts: Experts, routed: Routed, gradient: torch.Tensor) -> None:
        """Adds the tokens of a batch.

        Args:
            experts: The layer.
            routed: Its tokens.
            gradient: Of the summed loss by the layer's output, shape (tokens, hidden).
        """
        gradient = gradient.float()
        wider = experts.next_best(routed.tokens)
        ids = routed.index if wider is None else wider
        outputs = routed.tokens.new_zeros(*ids.shape, experts.shape.hidden, dtype=torch.float32)
        for expert in range(experts.shape.size.experts):
            rows, places = torch.where(ids == expert)
            channels = experts.channels(expert, routed.tokens[rows])
            if wider is not None:
                outputs[rows, places] = experts.outputs(expert, channels).float()
            own = (routed.index[rows] == expert).any(dim=1)
            shares = routed[rows[own]].shares(ids.new_tensor([[expert]])).float()
            scaled = gradient[rows[own]] * shares
            self._add_expert(experts, expert, channels[own].float(), scaled)
            self._add_spread(experts, expert, routed)
        total = gradient * routed.weights.float().square().sum(dim=1, keepdim=True).sqrt()
        self.layer_gradients += total.T @ total
        if wider is not None:
            self._add_drops(experts, routed, gradient, wider, outputs)

    def _add_expert(
        self, experts: Experts, expert: int, channels: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        if self.gradients.shape[1] < experts.shape.hidden:
            images = gradient @ experts.output_weight(expert).float()
        else:
            images = gradient
        self.channels[expert].addmm_(channels.T, channels)
        self.gradients[expert].addmm_(images.T, images)
        self.squares[expert] += gradient.square().sum()
        self.tokens[expert] += len(channels)

    def _add_spread(self, experts: Experts, expert: int, routed: Routed) -> None:
        step = max(1, round(_SPREAD * len(self.tokens) / routed.index.shape[1]))
        some = experts.channels(expert, routed.tokens[expert % step :: step]).float()
        self.spread[expert].addmm_(some.T, some)
        self.spread_tokens[expert] += len(some)

    def _add_drops(
        self,
        experts: Experts,
        routed: Routed,
        gradient: torch.Tensor,
        ids: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """Adds what the tokens of each expert lose once they are sent to the next best.

        With d the change of the layer's output the summed loss rises by half the sum of
        `(dL/dy . d)^2`; gradient and change are taken as independent, as everywhere in `kfac`.
        """
        for expert in range(len(self.tokens)):
            rows = torch.where((routed.index == expert).any(dim=1))[0]
            if not len(rows):
                continue
            after = experts.without(expert, routed.tokens[rows])
            shares = after.shares(ids[rows]) - routed[rows].shares(ids[rows])
            change = torch.einsum("tj,tjd->td", shares.float(), outputs[rows])
            size = gradient[rows].square().sum() * change.square().sum() / experts.shape.hidden
            both = torch.stack([(gradient[rows] @ change.T).square().sum(), size])
            self.drops[:, expert] += both / (2 * len(rows))

    def summed(self, processes: Processes) -> ExpertMoments:
        """Over all processes."""
        if processes.count > 1:
            losses = torch.tensor(self.losses, device=self.tokens.device)
            for value in (*vars(self).values(), losses):
                if isinstance(value, torch.Tensor):
                    dist.all_reduce(value)
            self.losses = int(losses)
        return self


class _Hooks:
    """Adds up the moments of several layers over the batches."""

    def __init__(self, layers: Mapping[str, Experts]) -> None:
        self.layers = layers
        self.moments = {name: ExpertMoments.zeros(each) for name, each in layers.items()}
        self.masks = BatchMasks()

    def installed(self) -> AbstractContextManager[None]:
        """Keeps the hooks on the layers for the time of the block."""
        return forward_hooks(
            {n: each.module for n, each in self.layers.items()}, self._on_forward, with_kwargs=True
        )

    def _on_forward(
        self,
        name: str,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        routed, result = Routed.of([*args, *kwargs.values()]), watched(output)
        assert routed is not None  # tried on the first batch
        if result is not None:
            mask = self.masks.mask_for(routed.tokens)
            result.register_hook(partial(self._on_gradient, name, routed, mask))
        return result

    @torch.no_grad()
    def _on_gradient(
        self, name: str, routed: Routed, mask: torch.Tensor | None, gradient: torch.Tensor
    ) -> None:
        gradient = gradient.reshape(len(routed.tokens), -1)
        given = (routed.tokens, routed.index, routed.weights, gradient)
        *kept, gradient = (unmasked_rows(each, mask) for each in given)
        self.moments[name].add(self.layers[name], Routed(*kept), gradient)


def collect_expert_moments(
    model: nn.Module,
    layers: Mapping[str, Experts],
    batches: Iterable[Batch],
    loss: LossFunction,
    *,
    seed: int = 0,
    on_batch: Callable[[], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, ExpertMoments]:
    """Runs the calibration batches and sums up the moments of layers of fused experts.

    The model is left as it was, hooks included, also after an exception.

    Args:
        model: Model with its task head.
        layers: Layers of experts by name.
        batches: Forward inputs as tensors; `attention_mask` marks padding with 0.
        loss: Loss of a batch.
        seed: Seed of sampled labels, as in `collect_moments`.
        on_batch: Called after each batch, for a progress bar.
        processes: Those that share the batches out among them; all get the sums over all batches.

    Raises:
        NumericalError: The loss of a batch is not finite.
    """
    hooks, losses = _Hooks(layers), 0
    with frozen(model), hooks.installed(), torch.random.fork_rng():
        for _, inputs in own_batches(model, batches, seed, processes, on_batch):
            hooks.masks = BatchMasks.of(inputs, is_encoder_decoder(model))
            losses += run_batch(model, inputs, loss, True)
    for moments in hooks.moments.values():
        moments.losses = losses
    return {name: moments.summed(processes) for name, moments in hooks.moments.items()}

"""What cuts do to the loss of text that they were not made from, by one backward pass.

A cut changes a weight by D. With labels drawn from the model's own predictions, the loss of an
item then changes, to first order, by

    c = sum_t g_t^T D x_t,    g = d(summed loss)/d(layer output),

and over the draws the mean of c^2 is D's quadratic form in the item's Fisher information, which is
the Gauss-Newton matrix of these losses. So `sum c^2 / (2 N)` over items with N scored positions is
the second-order rise of the mean loss. Nothing is taken to be independent here: neither inputs of
gradients, as in a Kronecker product of their moments, nor one position of another.

A cut drops the last components of `W = left right`, so one pass gives c for all of its steps.
See docs/methods.md, 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.measuring.collection import frozen, own_batches, run_batch
from hf_lowrank.measuring.distributed import ALONE, Processes
from hf_lowrank.measuring.embeddings import embedding_loss
from hf_lowrank.measuring.hooks import forward_hooks, watched
from hf_lowrank.measuring.items import Batch, LossFunction, without_labels
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.measuring.token_sums import sequences_of


@dataclass(frozen=True)
class Cut:
    """Ways to drop the last components of a layer's weight.

    Attributes:
        layer: Name of the layer.
        left: Shape (m, r).
        right: Shape (r, n); `left @ right` is the weight.
        counts: Components that are left at each step, ascending, at most r.
    """

    layer: str
    left: torch.Tensor
    right: torch.Tensor
    counts: Sequence[int]


@dataclass(frozen=True)
class Effects:
    """First-order changes of the loss by a cut, item by item.

    Attributes:
        items: c at each step, shape (items, steps), fp32; one draw of all items after another.
        squares: The same squared position by position and summed over these: c^2 less what
            positions have in common. Its mean is less noisy by far, shape (items, steps), fp32.
    """

    items: torch.Tensor
    squares: torch.Tensor


def measure_effects(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    cuts: Mapping[str, Cut],
    batches: Sequence[Batch],
    *,
    draws: int = 1,
    loss_function: LossFunction | None = None,
    seed: int = 0,
    on_batch: Callable[[], None] | None = None,
    processes: Processes = ALONE,
) -> tuple[dict[str, Effects], int]:
    """Measures cuts of a model that stays as it is.

    Args:
        model: The dense model with its task head.
        targets: Its layers by name.
        cuts: Cuts by a name of their own; several may be of one layer.
        batches: Text that the cuts were not made from.
        draws: How many times labels are drawn for each batch.
        loss_function: Loss of a batch; by default the model's own, its labels drawn.
        seed: Seed of the draws.
        on_batch: Called after each batch, for a progress bar.
        processes: Those that share the batches out among them.

    Returns:
        Effects by the cut's name, and N, the scored positions of all items.

    Raises:
        NumericalError: The loss of a batch is not finite.
    """
    compute = loss_function or partial(item_losses, label_source="model")
    is_embedding = embedding_loss(model, loss_function) is not None
    read = [without_labels(batch) for batch in batches] if is_embedding else batches
    watcher = _Watcher(targets, cuts)
    found: dict[tuple[int, int], dict[str, Effects]] = {}
    losses: dict[tuple[int, int], int] = {}
    with frozen(model), watcher.installed(), torch.random.fork_rng():
        for draw in range(draws):
            own_seed = seed + 1 + draw * len(batches)
            for index, inputs in own_batches(model, read, own_seed, processes, on_batch):
                watcher.start_batch(len(next(iter(inputs.values()))))
                losses[draw, index] = run_batch(model, inputs, compute, True)
                found[draw, index] = watcher.end_batch()
    losses, found = processes.merge(losses), processes.merge(found)
    in_order = [found[place] for place in sorted(found)]
    effects = {
        name: Effects(
            torch.cat([each[name].items for each in in_order]),
            torch.cat([each[name].squares for each in in_order]),
        )
        for name in cuts
    }
    return effects, sum(losses.values())


class _Watcher:
    """Hooks that add up the effects of cuts on a batch."""

    def __init__(self, targets: Mapping[str, nn.Module], cuts: Mapping[str, Cut]) -> None:
        self.layers = {cut.layer: targets[cut.layer] for cut in cuts.values()}
        self.cuts: dict[str, list[tuple[str, Cut]]] = {name: [] for name in self.layers}
        for name, cut in cuts.items():
            self.cuts[cut.layer].append((name, cut))
        self.found: dict[str, Effects] = {}
        self.items = 0

    def installed(self) -> AbstractContextManager[None]:
        """Keeps the hooks on the layers for the time of the block."""
        return forward_hooks(self.layers, self._on_forward)

    def start_batch(self, items: int) -> None:
        """Begins with no effect of any cut."""
        self.items = items
        sizes = {name: len(cut.counts) for cuts in self.cuts.values() for name, cut in cuts}
        self.found = {
            name: Effects(torch.zeros(items, steps), torch.zeros(items, steps))
            for name, steps in sizes.items()
        }

    def end_batch(self) -> dict[str, Effects]:
        """What was added up since, and nothing from now on."""
        found, self.items = self.found, 0
        return found

    def _on_forward(
        self, name: str, layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        result = watched(output) if self.items else None
        if result is not None:
            result.register_hook(partial(self._on_gradient, name, args[0].detach()))
        return result

    def _on_gradient(self, name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        items = sequences_of(gradient, self.items)
        rows, gradients = (
            each.float().reshape(items, -1, each.shape[-1]) for each in (inputs, gradient)
        )
        for key, cut in self.cuts[name]:
            effect = (gradients @ cut.left.to(gradients)) * (rows @ cut.right.to(rows).T)
            tails = _tails(effect, cut.counts)
            # Where items are no longer apart, their sum stands with the first: it is as good a
            # draw, since labels of different items are drawn apart.
            self.found[key].items[:items] += tails.sum(dim=1).cpu()
            self.found[key].squares[:items] += tails.square().sum(dim=1).cpu()


def _tails(effect: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Sums of the last dimension from each count on, shape (..., steps).

    Summed from the end: the last components are small, and a difference of large sums is not.
    """
    tails = effect.flip(-1).cumsum(dim=-1).flip(-1)
    return F.pad(tails, (0, 1))[..., torch.as_tensor(counts, device=effect.device)]

"""Hooks on the target layers that add up moments over unmasked tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import nn

from hf_lowrank.decomposition.moments import Moments, evenly
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.measuring.items import Batch
from hf_lowrank.measuring.masks import BatchMasks
from hf_lowrank.measuring.sharing import SharedInputs
from hf_lowrank.measuring.token_sums import (
    added,
    added_outer,
    centred,
    sequences_of,
    squared_rows,
    unmasked_rows,
)

INPUT_SIDES = ("input", "input_whole", "input_centred")
GRADIENT_FIELDS = frozenset({"output", "gradient_rows", "gradient"})


def watched(output: torch.Tensor) -> torch.Tensor | None:
    """A layer's output in a form whose gradient can be watched; None in a part without gradients.

    Where all parameters are frozen, the first target layers start the gradient's path. A model may
    write into an output in place, which a leaf of the graph forbids and after which hooks of a view
    are not called; so these two are copied.
    """
    if not torch.is_grad_enabled():
        return None
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    return output.clone() if output.is_leaf or output._is_view() else output


@contextmanager
def forward_hooks(
    layers: Mapping[str, nn.Module], hook: Callable[..., object], *, with_kwargs: bool = False
) -> Iterator[None]:
    """Has a function called after each layer, with the layer's name first, within the block."""
    handles = [
        layer.register_forward_hook(partial(hook, name), with_kwargs=with_kwargs)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Collector:
    """Hooks that add up this process's moments; symmetric ones in their lower blocks only.

    Attributes:
        moments: The sums by layer. What layers share is in the moments of the one that leads.
        shared: Who leads whom.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        needs: frozenset[str],
        whole: Collection[str],
        even: bool = False,
    ) -> None:
        self.targets = targets
        self.even = even
        self.needs = needs
        sides = needs & set(INPUT_SIDES)
        self.input_sides = dict.fromkeys(targets, sides)
        self.input_sides |= dict.fromkeys(whole, sides - {"input"} | {"input_whole"})
        self.moments = {name: Moments() for name in targets}
        self.shared = SharedInputs()
        self.masks = BatchMasks()
        self.active = False

    def installed(self) -> AbstractContextManager[None]:
        """Keeps the hooks on the layers for the time of the block."""
        return forward_hooks(self.targets, self._on_forward)

    def start_batch(self, batch: Batch, has_decoder: bool) -> None:
        """Forgets the last batch's tensors and notes the masks of this one."""
        self.active = True
        self.shared.start_batch()
        self.masks = BatchMasks.of(batch, has_decoder)

    def _on_forward(
        self,
        name: str,
        layer: nn.Module,
        args: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        if not self.active:
            return None
        mask = self.masks.mask_for(args[0])
        moment = self.moments[name]
        moment.tokens += int(mask.sum()) if mask is not None else args[0][..., 0].numel()
        if not self.even:
            self._add_input(name, layer, args[0], output.detach(), mask)
        result = watched(output) if self.needs & GRADIENT_FIELDS else None
        if result is not None:
            reads_input = self.even or self.needs & {"gradient", "gradient_rows"}
            keep_input = args[0].detach() if reads_input else None
            result.register_hook(partial(self._on_gradient, name, layer, mask, keep_input))
        return result

    def _add_input(
        self,
        name: str,
        layer: nn.Module,
        inputs: torch.Tensor,
        output: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        moment = self.moments[name]
        rows_out, rows_in = linear_shape(layer)
        for part in self.input_sides[name]:
            vectors, image = inputs.detach(), output
            if part == "input_centred":
                vectors, image = (centred(t, mask, self.masks.batch_size) for t in (vectors, image))
            elif rows_in > rows_out and part == "input" and layer.bias is not None:
                image = output - layer.bias  # type: ignore[operator]
            total = getattr(moment, part)
            if rows_in > rows_out and part != "input_whole":
                squares = float(unmasked_rows(vectors, mask).float().square().sum())
                total = added_outer(total, unmasked_rows(image, mask), squares, rows_in)
            elif self.shared.leads(part, name, inputs):
                total = added_outer(total, unmasked_rows(vectors, mask))
            setattr(moment, part, total)
        if "input_abs" in self.needs and self.shared.leads("input_abs", name, inputs):
            rows = unmasked_rows(inputs.detach(), mask)
            moment.input_abs = added(moment.input_abs, rows.float().abs().sum(dim=0))

    def _add_even(
        self, name: str, layer: nn.Module, inputs: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor:
        """Adds inputs weighted by what a token contributes; returns the gradients, so weighted."""
        moment, weight = self.moments[name], linear_weight(layer)
        rows, gradients, strength = evenly(inputs, gradients)
        moment.strength = (moment.strength or 0.0) + strength
        for part in self.input_sides[name]:
            image, squares, size = rows, None, None
            if weight.shape[1] > weight.shape[0] and part != "input_whole":
                image, size = rows @ weight.to(rows.dtype).T, weight.shape[1]
                squares = float(rows.square().sum())
            setattr(moment, part, added_outer(getattr(moment, part), image, squares, size))
        return gradients

    def _on_gradient(
        self,
        name: str,
        layer: nn.Module,
        mask: torch.Tensor | None,
        inputs: torch.Tensor | None,
        gradient: torch.Tensor,
    ) -> None:
        moment = self.moments[name]
        rows = unmasked_rows(gradient, mask)
        if self.even:
            assert inputs is not None  # kept on the way forward
            rows = self._add_even(name, layer, unmasked_rows(inputs, mask), rows)
        if "output" in self.needs:
            rows_out, rows_in = linear_shape(layer)
            if rows_out > rows_in:
                squares = float(rows.float().square().sum())
                image = rows @ linear_weight(layer).to(rows.dtype)
                moment.output = added_outer(moment.output, image, squares, rows_out)
            else:
                moment.output = added_outer(moment.output, rows)
        if inputs is None or not self.needs & {"gradient", "gradient_rows"}:
            return
        sequences = sequences_of(gradient, self.masks.batch_size)
        gradients = gradient.float().reshape(sequences, -1, gradient.shape[-1])
        rows = inputs.float().reshape(sequences, -1, inputs.shape[-1])
        if "gradient_rows" in self.needs:
            moment.gradient_rows = added(moment.gradient_rows, squared_rows(gradients, rows))
        if "gradient" in self.needs:
            moment.gradient = added(moment.gradient, gradients.flatten(0, 1).T @ rows.flatten(0, 1))

"""Calibration: batches in, second moments of every target layer's inputs and gradients out.

Hooks on the target layers sum up, over unmasked tokens only and in fp32,

    C = sum x x^T,    G = sum g g^T,    g = d(summed loss)/d(layer output),

where the larger side's vectors are replaced by their images under the weight, `W x` or `W^T g`
(see decomposition/moments.py). Layers that read the same tensor (q, k and v; gate and up) share
one C, which is collected once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.measuring.distributed import ALONE, Processes, sum_moments
from hf_lowrank.measuring.losses import (
    IGNORED,
    Batch,
    LossFunction,
    eval_mode,
    forward_body,
    is_encoder_decoder,
    item_losses,
    prepare_losses,
)

_BLOCK = 256
_DECODER_PADDING = {"labels": IGNORED, "decoder_input_ids": 0, "decoder_attention_mask": 0}
_INPUT_SIDES = ("input", "input_whole", "input_centred")
GRADIENT_FIELDS = frozenset({"output", "gradient_rows", "gradient"})


def collect_moments(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    needs: frozenset[str],
    *,
    loss_function: LossFunction | None = None,
    whole: Collection[str] = (),
    label_source: str = "data",
    seed: int = 0,
    on_batch: Callable[[], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Moments]:
    """Runs the calibration batches through the model and sums up what `needs` names.

    The model is put into eval mode with all parameters frozen, and is left as it was, hooks
    included, also after an exception.

    Args:
        model: Model with its task head.
        targets: Layers by name.
        batches: Forward inputs as tensors; `attention_mask` marks padding with 0.
        needs: Names of `Moments` fields.
        loss_function: Loss of a batch; by default the model's own task loss.
        whole: Layers of which `input_whole` is collected in place of `input`, which follows from
            it: that of the images is `W C W^T`.
        label_source: See `item_losses`.
        seed: Seed of sampled labels.
        on_batch: Called after each batch, for a progress bar.
        processes: Those that share the batches out among them; all get the sums over all batches.

    Returns:
        Moments by layer name.

    Raises:
        DataError: There is no batch, or a layer was never reached.
        NumericalError: The loss of a batch is not finite.
    """
    collector = _Collector(targets, needs, whole)
    compute = loss_function or partial(item_losses, label_source=label_source)
    device = next(model.parameters()).device
    losses = 0
    with _frozen(model), collector.installed(), torch.random.fork_rng():
        for index, batch in enumerate(batches):
            if not processes.owns(index):
                continue
            torch.manual_seed(seed + index)  # the same draws, whichever process has the batch
            inputs = _separate_lengths(model, {k: v.to(device) for k, v in batch.items()})
            prepare_losses(model, inputs)
            collector.start_batch(inputs, has_decoder=is_encoder_decoder(model))
            if not needs & GRADIENT_FIELDS:
                with torch.no_grad():
                    forward_body(model, inputs)
                losses += 1
            else:
                with torch.enable_grad():
                    result = compute(model, inputs)
                    total = result.sums.sum()
                if not bool(torch.isfinite(total.detach())):
                    value = float(total.detach())
                    raise NumericalError(f"The calibration loss is {value}, not a number.")
                total.backward()
                losses += int(result.counts.sum())
            collector.active = False
            if on_batch is not None:
                on_batch()
    return collector.finish(losses, device, processes)


class _Collector:
    """Hooks that add up moments."""

    def __init__(
        self, targets: Mapping[str, nn.Module], needs: frozenset[str], whole: Collection[str]
    ) -> None:
        self.targets = targets
        self.needs = needs
        sides = needs & set(_INPUT_SIDES)
        self.input_sides = dict.fromkeys(targets, sides)
        self.input_sides |= dict.fromkeys(whole, sides - {"input"} | {"input_whole"})
        self.moments = {name: Moments() for name in targets}
        self.leaders: dict[tuple[str, str], str] = {}
        self.seen: dict[tuple[str, int], tuple[weakref.ref[torch.Tensor], str]] = {}
        self.masks: list[torch.Tensor] = []
        self.active = False
        self.batch_size = 1

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keeps the hooks on the layers for the time of the block."""
        handles = [
            layer.register_forward_hook(partial(self._on_forward, name))
            for name, layer in self.targets.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start_batch(self, batch: Batch, has_decoder: bool) -> None:
        """Forgets the last batch's tensors and notes the masks of this one."""
        self.active = True
        self.seen.clear()
        first = next(iter(batch.values()))
        self.batch_size = len(first)
        self.masks = [batch["attention_mask"].bool()] if "attention_mask" in batch else []
        if has_decoder and "labels" in batch:
            if not self.masks and "input_ids" in batch:
                self.masks.append(torch.ones_like(batch["input_ids"], dtype=torch.bool))
            self.masks.append(batch["labels"] != IGNORED)

    def finish(self, losses: int, device: torch.device, processes: Processes) -> dict[str, Moments]:
        """The moments of all processes, once every layer is known to have been reached."""
        for moment in self.moments.values():
            moment.losses = losses
        self.leaders = processes.merge(self.leaders)
        self.moments = sum_moments(self.moments, device, processes)
        if not any(moment.losses for moment in self.moments.values()):
            raise DataError("The calibration data holds no batch.")
        unreached = sorted(name for name, moment in self.moments.items() if not moment.tokens)
        if unreached:
            raise DataError(
                f"No calibration token reached {', '.join(unreached[:5])}; exclude these layers "
                "or use data that reaches them."
            )
        for name, moment in self.moments.items():
            for part in (*_INPUT_SIDES, "input_abs"):
                leader = self.leaders.get((part, name), name)
                setattr(moment, part, getattr(self.moments[leader], part))
            if moment.output is not None:
                _mirror_(moment.output.matrix)
            for part in _INPUT_SIDES:
                found = getattr(moment, part)
                if found is not None and self.leaders.get((part, name), name) == name:
                    _mirror_(found.matrix)
        for name, sides in self.input_sides.items():
            if "input" in self.needs and "input" not in sides:
                self.moments[name].input = _seen_by(self.targets[name], self.moments[name])
        return self.moments

    def _on_forward(
        self,
        name: str,
        layer: nn.Module,
        args: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        if not self.active:
            return None
        mask = self._mask_for(args[0])
        moment = self.moments[name]
        moment.tokens += int(mask.sum()) if mask is not None else args[0][..., 0].numel()
        self._add_input(name, layer, args[0], output.detach(), mask)
        if not self.needs & GRADIENT_FIELDS:
            return None
        if not output.requires_grad:
            # All parameters are frozen: the first target layers start the gradient's path.
            output = output.detach().requires_grad_()
        keep_input = args[0].detach() if self.needs & {"gradient", "gradient_rows"} else None
        output.register_hook(partial(self._on_gradient, name, layer, mask, keep_input))
        return output

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
                vectors, image = (_centred(t, mask, self.batch_size) for t in (vectors, image))
            elif rows_in > rows_out and part == "input" and layer.bias is not None:
                image = output - layer.bias  # type: ignore[operator]
            total = getattr(moment, part)
            if rows_in > rows_out and part != "input_whole":
                squares = float(_rows(vectors, mask).float().square().sum())
                total = _add_outer(total, _rows(image, mask), squares, rows_in)
            elif self._leads(part, name, inputs):
                total = _add_outer(total, _rows(vectors, mask))
            setattr(moment, part, total)
        if "input_abs" in self.needs and self._leads("input_abs", name, inputs):
            rows = _rows(inputs.detach(), mask)
            moment.input_abs = _add(moment.input_abs, rows.float().abs().sum(dim=0))

    def _on_gradient(
        self,
        name: str,
        layer: nn.Module,
        mask: torch.Tensor | None,
        inputs: torch.Tensor | None,
        gradient: torch.Tensor,
    ) -> None:
        moment = self.moments[name]
        if "output" in self.needs:
            rows = _rows(gradient, mask)
            rows_out, rows_in = linear_shape(layer)
            if rows_out > rows_in:
                squares = float(rows.float().square().sum())
                image = rows @ linear_weight(layer).to(rows.dtype)
                moment.output = _add_outer(moment.output, image, squares, rows_out)
            else:
                moment.output = _add_outer(moment.output, rows)
        if inputs is None:
            return
        positions = gradient.shape[:-1].numel()
        sequences = self.batch_size if positions % self.batch_size == 0 else 1
        gradients = gradient.float().reshape(sequences, -1, gradient.shape[-1])
        rows = inputs.float().reshape(sequences, -1, inputs.shape[-1])
        if "gradient_rows" in self.needs:
            moment.gradient_rows = _add(moment.gradient_rows, _squared_rows(gradients, rows))
        if "gradient" in self.needs:
            moment.gradient = _add(moment.gradient, gradients.flatten(0, 1).T @ rows.flatten(0, 1))

    def _leads(self, part: str, name: str, inputs: torch.Tensor) -> bool:
        """Whether this layer is the first of the batch to collect this part of this very tensor."""
        known = self.seen.get((part, id(inputs)))
        leader = name if known is None or known[0]() is not inputs else known[1]
        self.seen[part, id(inputs)] = (weakref.ref(inputs), leader)
        before = self.leaders.setdefault((part, name), leader)
        if before != leader:
            raise NumericalError(
                f"{name}: shared its input with {before} in one batch and with {leader} in "
                "another; exclude the layer."
            )
        return leader == name

    def _mask_for(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """The mask of these positions; batch and choice axes may have been flattened."""
        positions = inputs.shape[:-1]
        for mask in self.masks:
            is_flat = len(positions) == 1 or positions[-1] == mask.shape[-1]
            if is_flat and positions.numel() == mask.numel():
                return mask.reshape(positions)
        return None


def _seen_by(layer: nn.Module, moments: Moments) -> SecondMoment:
    """`input` from `input_whole`: the same, or that of the images of a layer with more inputs."""
    whole = moments.input_whole
    assert whole is not None  # collected by name
    rows_out, rows_in = linear_shape(layer)
    if rows_in <= rows_out:
        return whole
    weight = linear_weight(layer).float()
    return SecondMoment(weight @ whole.matrix @ weight.T, whole.squares, rows_in)


def _rows(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Unmasked positions as rows, shape (tokens, features)."""
    if mask is not None and not bool(mask.all()):
        return tensor[mask]
    return tensor.reshape(-1, tensor.shape[-1])


def _centred(tensor: torch.Tensor, mask: torch.Tensor | None, batch_size: int) -> torch.Tensor:
    """The vectors less their mean over the unmasked positions of each sequence, in fp32.

    A sequence of a single position has no spread and stays as it is.
    """
    positions = tensor.shape[:-1].numel()
    sequences = batch_size if positions % batch_size == 0 else 1
    vectors = tensor.float().reshape(sequences, -1, tensor.shape[-1])
    if vectors.shape[1] == 1:
        return tensor.float()
    weights = vectors.new_ones(vectors.shape[:2])
    if mask is not None:
        weights = mask.to(vectors).reshape(sequences, -1)
    total = (vectors * weights[..., None]).sum(dim=1) / weights.sum(dim=1)[:, None].clamp_min(1)
    return (vectors - total[:, None]).reshape(tensor.shape)


def _squared_rows(gradients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Row sums of the squared weight gradients `G^T X` of the sequences, summed over these.

    Args:
        gradients: G, shape (sequences, length, m).
        rows: X, shape (sequences, length, n).

    Returns:
        Shape (m,).
    """
    if rows.shape[1] < rows.shape[2]:  # diag(G^T (X X^T) G), without a matrix of shape (m, n)
        return ((rows @ rows.mT @ gradients) * gradients).sum(dim=(0, 1))
    return (gradients.mT @ rows).square().sum(dim=(0, 2))


def _add(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part.clone() if total is None else total.add_(part)


def _add_outer(
    total: SecondMoment | None,
    rows: torch.Tensor,
    squares: float | None = None,
    size: int | None = None,
) -> SecondMoment:
    """Adds `rows^T rows`, its lower blocks only: a symmetric matrix needs no more."""
    rows = rows.float()
    if squares is None or size is None:
        squares, size = float(rows.square().sum()), rows.shape[1]
    if total is None:
        total = SecondMoment(rows.new_zeros(rows.shape[1], rows.shape[1]), 0.0, size)
    total.squares += squares
    for start in range(0, rows.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        below = slice(start, None)
        total.matrix[below, block].addmm_(rows[:, below].T, rows[:, block])
    return total


def _mirror_(matrix: torch.Tensor) -> None:
    """Fills the upper triangle from the lower one, in place."""
    lower = matrix.tril(-1)
    matrix.tril_().add_(lower.T)


def _separate_lengths(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Makes sure that encoder and decoder positions can be told apart by their number.

    Masks are matched to activations by shape, so equal lengths are ambiguous where the masks
    differ. One more ignored label at the end separates them; where the decoder has no position
    left for it, the last label is dropped instead.
    """
    labels, inputs = batch.get("labels"), batch.get("input_ids")
    if not is_encoder_decoder(model) or labels is None or inputs is None:
        return batch
    if labels.shape != inputs.shape:
        return batch
    config: Any = model.config
    limit = getattr(getattr(config, "decoder", config), "max_position_embeddings", None)
    limit = getattr(config, "max_decoder_position_embeddings", limit)  # LED's own name
    is_full = limit is not None and labels.shape[1] >= limit
    mask = batch.get("attention_mask", torch.ones_like(inputs)).bool()
    if is_full and torch.equal(mask, labels != IGNORED):
        return batch
    for name, value in _DECODER_PADDING.items():
        if name in batch:
            change = (0, -1 if is_full else 1)
            batch[name] = torch.nn.functional.pad(batch[name], change, value=value)
    return batch


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients, for the time of the block."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)

"""Calibration: batches in, second moments of every target layer's inputs and gradients out.

Hooks on the target layers sum up, over unmasked tokens only and in fp32,

    C = sum x x^T,    G = sum g g^T,    g = d(summed loss)/d(layer output),

where the larger side's vectors are replaced by their images under the weight, `W x` or `W^T g`
(see decomposition/moments.py). Layers that read the same tensor (q, k and v; gate and up) share
one C, which is collected once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.measuring.distributed import ALONE, Processes, sum_moments
from hf_lowrank.measuring.hooks import GRADIENT_FIELDS, INPUT_SIDES, Collector
from hf_lowrank.measuring.items import (
    Batch,
    LossFunction,
    device_of,
    eval_mode,
    is_encoder_decoder,
)
from hf_lowrank.measuring.losses import forward_body, item_losses, prepare_losses
from hf_lowrank.measuring.masks import separate_lengths
from hf_lowrank.measuring.token_sums import mirror_


def collect_moments(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    needs: frozenset[str],
    *,
    loss_function: LossFunction | None = None,
    whole: Collection[str] = (),
    even: bool = False,
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
        even: Whether tokens are weighted by what they contribute, see `evenly`; then inputs that
            layers share have a moment for each of them.
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
    collector = Collector(targets, needs, whole, even)
    needs_gradient = bool(needs & GRADIENT_FIELDS)
    compute = loss_function
    if compute is None and needs_gradient:
        compute = partial(item_losses, label_source=label_source)
    device = device_of(model)
    losses = 0
    with frozen(model), collector.installed(), torch.random.fork_rng():
        for _, inputs in own_batches(model, batches, seed, processes, on_batch):
            collector.start_batch(inputs, has_decoder=is_encoder_decoder(model))
            losses += run_batch(model, inputs, compute, needs_gradient)
            collector.active = False
    for moment in collector.moments.values():
        moment.losses = losses
    leaders = processes.merge(collector.shared.leaders)
    moments = sum_moments(collector.moments, device, processes)
    return _completed(moments, leaders, targets, whole if "input" in needs else ())


def own_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    seed: int,
    processes: Processes,
    on_batch: Callable[[], None] | None,
) -> Iterator[tuple[int, Batch]]:
    """The batches that this process has to run, by their number, as calibration runs them.

    Args:
        model: The model that will read them.
        batches: Those of all processes.
        seed: Of what is drawn for the first; the next has the next.
        processes: Those that share the batches out among them.
        on_batch: Called after each.
    """
    for index, batch in enumerate(batches):
        if processes.owns(index):
            torch.manual_seed(seed + index)  # the same draws, whichever process has the batch
            yield index, prepared(model, batch)
            if on_batch is not None:
                on_batch()


def prepared(model: nn.Module, batch: Batch) -> Batch:
    """The batch as calibration runs it: on the model's device, its lengths told apart."""
    device = device_of(model)
    inputs = separate_lengths(model, {name: value.to(device) for name, value in batch.items()})
    prepare_losses(model, inputs)
    return inputs


def run_batch(
    model: nn.Module, batch: Batch, compute: LossFunction | None, needs_gradient: bool
) -> int:
    """One pass for the sake of hooks: forward alone, or forward and backward.

    Args:
        model: The model.
        batch: Its inputs.
        compute: The loss; without one, and without gradients, the layers alone are run.
        needs_gradient: Whether the pass goes backward, too.

    Returns:
        Scored positions of the loss, or 1 without gradients.

    Raises:
        NumericalError: The loss is not finite.
    """
    if compute is None or not needs_gradient:
        with torch.no_grad():
            (compute or forward_body)(model, batch)
        return 1
    with torch.enable_grad():
        result = compute(model, batch)
        total = result.sums.sum()
    if not bool(torch.isfinite(total.detach())):
        raise NumericalError(
            f"The calibration loss is {float(total.detach())}, not a number; load the model in "
            "float32, or in bfloat16 in place of float16."
        )
    if total.requires_grad:  # else no target lies on the gradient's path
        total.backward()
    return int(result.counts.sum())


def _completed(
    moments: dict[str, Moments],
    leaders: Mapping[tuple[str, str], str],
    targets: Mapping[str, nn.Module],
    whole: Collection[str],
) -> dict[str, Moments]:
    """Whole matrices for every layer, once each is known to have been reached.

    Args:
        moments: All processes' sums.
        leaders: See `SharedInputs`.
        targets: Layers by name.
        whole: Those whose `input` follows from `input_whole`.
    """
    if not any(moment.losses for moment in moments.values()):
        raise DataError("The calibration data holds no batch; pass at least one.")
    unreached = sorted(name for name, moment in moments.items() if not moment.tokens)
    if unreached:
        raise DataError(
            f"No calibration token reached {', '.join(unreached[:5])}; exclude these layers "
            "or use data that reaches them."
        )
    for name, moment in moments.items():
        for part in (*INPUT_SIDES, "input_abs"):
            leader = leaders.get((part, name), name)
            setattr(moment, part, getattr(moments[leader], part))
        if moment.output is not None:
            mirror_(moment.output.matrix)
        for part in INPUT_SIDES:
            found = getattr(moment, part)
            if found is not None and leaders.get((part, name), name) == name:
                mirror_(found.matrix)
    for name in whole:
        moments[name].input = _seen_by(targets[name], moments[name])
    return moments


def _seen_by(layer: nn.Module, moments: Moments) -> SecondMoment:
    """`input` from `input_whole`: the same, or that of the images of a layer with more inputs."""
    whole = moments.input_whole
    assert whole is not None  # collected by name
    rows_out, rows_in = linear_shape(layer)
    if rows_in <= rows_out:
        return whole
    weight = linear_weight(layer).float()
    return SecondMoment(weight @ whole.matrix @ weight.T, whole.squares, rows_in)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
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

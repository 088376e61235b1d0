"""The surface that users of PEFT know: `get_lowrank_model(model, config)`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn

from hf_lowrank.compression.verbs import compress
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring.items import Batch, LossFunction


def get_lowrank_model(
    model: nn.Module,
    config: LowRankConfig,
    calibration: Iterable[Batch] | None = None,
    *,
    held_out: Iterable[Batch] | None = None,
    loss_function: LossFunction | None = None,
    progress: bool = True,
) -> nn.Module:
    """Compresses a model in place and returns it, ready to train.

    Args:
        model: The dense model.
        config: Goal, metric, rule and targets.
        calibration: Batches of forward inputs; not needed with `metric="plain"`.
        held_out: As in `compress`, as all that follow; whoever wants its report, recovery or
            cache calls that.
        loss_function: Loss of a batch.
        progress: Whether to show progress bars.

    Returns:
        The same model object, its target layers factorized, with a method
        `print_trainable_parameters` as PEFT's models have it.

    Raises:
        ConfigError: The weights are to be quantized; see also `compress`.
    """
    if config.weights is not None:
        raise ConfigError(
            f"get_lowrank_model returns a model to train, which weights={config.weights!r} can't "
            "be; leave weights out, or call hf_lowrank.compress."
        )
    compress(
        model,
        config,
        calibration,
        held_out=held_out,
        loss_function=loss_function,
        progress=progress,
    )
    model.print_trainable_parameters = partial(  # type: ignore[assignment]
        print_trainable_parameters, model
    )
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters a training would change, in the words of PEFT.

    Tied weights are counted once.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable, everything = sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
    share = 100 * trainable / max(everything, 1)
    print(
        f"trainable params: {trainable:,d} || all params: {everything:,d} || "
        f"trainable%: {share:.4f}"
    )

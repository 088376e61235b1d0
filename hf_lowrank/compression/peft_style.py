"""The surface that users of PEFT know: `get_lowrank_model(model, config)`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from hf_lowrank.compression.verbs import compress
from hf_lowrank.config import LowRankConfig
from hf_lowrank.measuring.items import Batch


def get_lowrank_model(
    model: nn.Module,
    config: LowRankConfig,
    calibration: Iterable[Batch] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Compresses a model in place and returns it, ready to train.

    Args:
        model: The dense model.
        config: Goal, metric, rule and targets.
        calibration: Batches of forward inputs; not needed with `metric="plain"`.
        **kwargs: Passed on to `compress`.

    Returns:
        The same model object, its target layers factorized, with a method
        `print_trainable_parameters` as PEFT's models have it.
    """
    compress(model, config, calibration, **kwargs)
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

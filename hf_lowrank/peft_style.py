"""The surface that users of PEFT know: `get_lowrank_model(model, config)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_lowrank.compression import compress
from hf_lowrank.config import LowRankConfig
from hf_lowrank.losses import Batch


def get_lowrank_model(
    model: nn.Module,
    config: LowRankConfig,
    calibration: Sequence[Batch] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Compresses a model in place and returns it, ready to train.

    Args:
        model: The dense model.
        config: Goal, metric, rule and targets.
        calibration: Batches of forward inputs; not needed with `metric="plain"`.
        **kwargs: Passed on to `compress`.

    Returns:
        The same model object, its target layers factorized.
    """
    compress(model, config, calibration, **kwargs)
    return model

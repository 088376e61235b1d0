"""The layers of a run, found on the first of its batches."""

from __future__ import annotations

from torch import nn

from hf_lowrank.compression.options import Run
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.measuring.hooks import GRADIENT_FIELDS
from hf_lowrank.modeling.qualification import Qualified, qualified


def run_targets(
    model: nn.Module, config: LowRankConfig, run: Run, *, with_gradients: bool = False
) -> Qualified:
    """The layers that can be factorized, and why others that were asked for stay dense.

    Args:
        model: The dense model.
        config: Names the layers; its metric says whether a gradient must reach them.
        run: Its first batch is tried, of the calibration text where there is one.
        with_gradients: Whether gradients are read whatever the metric.

    Raises:
        TargetError, ConfigError, DataError, NumericalError: See `qualified`.
    """
    texts = (run.texts.calibration, run.texts.held_out, run.texts.evaluation)
    return qualified(
        model,
        config,
        next((batches[0] for batches in texts if batches), None),
        needs_gradient=with_gradients or bool(METRICS[config.metric].needs & GRADIENT_FIELDS),
        loss_function=run.options.loss_function,
        processes=run.processes,
    )

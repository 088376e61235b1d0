"""`compress` and `sweep`: the verbs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from hf_lowrank.compression.recipe import recipe_of
from hf_lowrank.compression.run import CompressionRun, RunOptions, Texts, check_goal, split_texts
from hf_lowrank.compression.stages import check_stages, compress_in_stages
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring.losses import Batch
from hf_lowrank.modeling.marks import attach_config
from hf_lowrank.modeling.surgery import restore_
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.schema import Report


def compress(
    model: nn.Module,
    config: LowRankConfig | None = None,
    calibration: Sequence[Batch] | None = None,
    evaluation: Sequence[Batch] | None = None,
    *,
    held_out: Sequence[Batch] | None = None,
    foreign: Sequence[Batch] | None = None,
    **options: Any,
) -> Report:
    """Factorizes a model's linear layers in place, with ranks chosen by their effect on the loss.

    Afterwards `model.save_pretrained` writes a checkpoint that `from_pretrained` loads once
    hf_lowrank is imported. Under `accelerate launch` every process calls this with the same model
    and the same batches: calibration and decomposition are shared out, and all end with the same
    model. Call it before `Accelerator.prepare`.

    Args:
        model: The dense model; a transformers model, or any module with a `loss_function`.
        config: Goal, metric, rule and targets; by default a loss tolerance of 0.05 nats. Where it
            leaves channels and measured prices open, the best for the kind of model. If its
            `ranks` are filled, as in a checkpoint's config, they are replayed whatever the goal.
        calibration: Batches of forward inputs (tensors by name) for the moments.
        evaluation: Batches for the report's before and after; nothing else looks at them.
        held_out: Batches on which a loss tolerance is tested, ranks are searched for, prices are
            corrected and a recovery is judged. By default the last quarter of the calibration
            batches, which then do not enter the moments.
        foreign: Batches of another kind than the calibration's, for a second before and after in
            the report: a model that was cut looks better on text like its calibration than it is.
        **options: Fields of `RunOptions`.

    Returns:
        The report. The model itself is changed in place.

    Raises:
        ConfigError, TargetError, DataError: Before anything is changed.
        NumericalError: A loss is NaN or infinite.
    """
    chosen = RunOptions(**options)
    config = recipe_of(
        model, config or LowRankConfig(), calibration, held_out, chosen.loss_function
    )
    texts = split_texts(
        config, Texts(calibration, held_out, evaluation, foreign), chosen.recover_steps
    )
    check_stages(config, chosen.stages, chosen.recover_steps)
    if chosen.stages > 1:
        return compress_in_stages(model, config, texts, chosen)
    run = CompressionRun(model, config, texts, chosen)
    return run.apply(*run.choose())


def sweep(
    model: nn.Module,
    config: LowRankConfig,
    param_ratios: Sequence[float],
    calibration: Sequence[Batch] | None = None,
    evaluation: Sequence[Batch] | None = None,
    *,
    held_out: Sequence[Batch] | None = None,
    foreign: Sequence[Batch] | None = None,
    **options: Any,
) -> Iterator[Report]:
    """Compresses a model at several sizes from the same spectra.

    The model is compressed while the caller handles each report, and dense again afterwards.

    Args:
        model: The dense model.
        config: Metric, rule and targets; its goal is replaced by each ratio.
        param_ratios: Kept shares of the targeted parameters.
        calibration: As in `compress`.
        evaluation: As in `compress`.
        held_out: As in `compress`.
        foreign: As in `compress`.
        **options: Fields of `RunOptions`.

    Yields:
        One report for each ratio.

    Raises:
        ConfigError, TargetError, DataError: Before anything is changed.
    """
    chosen = RunOptions(**options)
    configs = [
        recipe_of(
            model,
            config.replace(param_ratio=ratio, loss_tolerance=None, rank=None, ranks=None),
            calibration,
            held_out,
            chosen.loss_function,
        )
        for ratio in param_ratios
    ]
    if not configs:
        return
    targets = find_targets(model, configs[0])
    for each in configs:
        check_goal(targets, each)
    if chosen.stages != 1:
        raise ConfigError("stages lead to one size; call compress for each.")
    texts = split_texts(
        configs[0], Texts(calibration, held_out, evaluation, foreign), chosen.recover_steps
    )
    run = CompressionRun(model, configs[0], texts, chosen)
    for each in configs:
        run.use(each)
        originals = {name: model.get_submodule(name) for name in run.analysis.shapes}
        shared = dict(run.stopwatch.seconds)
        try:
            yield run.apply(*run.choose())
        finally:
            restore_(model, originals)
            attach_config(model, None)
            run.stopwatch.seconds = shared

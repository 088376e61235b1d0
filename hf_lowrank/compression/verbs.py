"""`compress` and `sweep`: the verbs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.application import apply_, cut_, make_dense_again_, measure_dense
from hf_lowrank.compression.byte_budget import check_size_goal
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.goals import check_channels, check_goal
from hf_lowrank.compression.options import (
    Run,
    RunOptions,
    Stopwatch,
    read_texts,
    run_targets,
    split_texts,
    with_dense_embeddings,
    with_experts,
)
from hf_lowrank.compression.prices import check_prices
from hf_lowrank.compression.recipe import possible_recipe, recipe_of
from hf_lowrank.compression.recovery import check_recoverable, recovery_settings
from hf_lowrank.compression.stages import check_stages, compress_in_stages_
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.feed_forward import find_feed_forwards
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.embeddings import embedding_loss
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.modeling.weight_precision import check_quantizable
from hf_lowrank.report.schema import Report


def compress(
    model: nn.Module,
    config: LowRankConfig | None = None,
    calibration: Iterable[Batch] | None = None,
    evaluation: Iterable[Batch] | None = None,
    *,
    held_out: Iterable[Batch] | None = None,
    foreign: Iterable[Batch] | None = None,
    loss_function: LossFunction | None = None,
    recover_steps: int = 0,
    recover: str | None = None,
    stages: int = 1,
    speed: bool = False,
    cache_dir: str | Path | None = None,
    moment_gib: float = RunOptions.moment_gib,
    progress: bool = True,
) -> Report:
    """Factorizes a model's linear layers in place, with ranks chosen by their effect on the loss.

    Afterwards `model.save_pretrained` writes a checkpoint that `from_pretrained` loads once
    hf_lowrank is imported. Under `accelerate launch` every process calls this with the same model
    and the same batches: calibration and decomposition are shared out, and all end with the same
    model. Call it before `Accelerator.prepare`. If anything goes wrong, the model is as it was.

    Args:
        model: The dense model; a transformers model, or any module with a `loss_function`.
        config: Goal, metric, rule and targets; by default a loss tolerance of 0.05 nats. Where it
            leaves channels and measured prices open, the best for the kind of model. If its
            `ranks` are filled, as in a checkpoint's config, they are replayed whatever the goal.
        calibration: Batches of forward inputs (tensors by name) for the moments, as any iterable;
            read once, see `checked_batches`.
        evaluation: Batches for the report's before and after; nothing else looks at them.
        held_out: Batches on which a loss tolerance is tested, types of weights are tried, cuts
            are priced and a recovery is judged. By default the last quarter of the calibration
            batches, which then do not enter the moments.
        foreign: Batches unlike the calibration's, for the report: on like ones a cut looks better.
        loss_function: See `RunOptions`, as all that follow.
        recover_steps: Steps of training the factors after the cut.
        recover: What they train, "factors" or "lora".
        stages: Cuts in which the size is reached.
        speed: Whether to time the model before and after.
        cache_dir: Folder for moments and spectra.
        moment_gib: Memory for moments, GiB.
        progress: Whether to show progress bars.

    Returns:
        The report. The model itself is changed in place.

    Raises:
        ConfigError, TargetError, DataError: Before anything is changed.
        NumericalError: A loss is NaN or infinite.
    """
    options = RunOptions(
        loss_function=loss_function,
        cache_dir=cache_dir,
        moment_gib=moment_gib,
        recover_steps=recover_steps,
        recover=recover,
        stages=stages,
        speed=speed,
        progress=progress,
    )
    config, run, targets, left_dense = _prepare(
        model,
        config or LowRankConfig(),
        options,
        calibration=calibration,
        held_out=held_out,
        evaluation=evaluation,
        foreign=foreign,
    )
    check_run(model, targets, config, run)
    dense = measure_dense(model, targets, run, left_dense)
    if stages > 1:
        return compress_in_stages_(model, config, dense, run)
    return cut_(model, targets, config, dense, run)


def sweep(
    model: nn.Module,
    config: LowRankConfig,
    param_ratios: Sequence[float],
    calibration: Iterable[Batch] | None = None,
    evaluation: Iterable[Batch] | None = None,
    *,
    held_out: Iterable[Batch] | None = None,
    foreign: Iterable[Batch] | None = None,
    loss_function: LossFunction | None = None,
    recover_steps: int = 0,
    recover: str | None = None,
    speed: bool = False,
    cache_dir: str | Path | None = None,
    moment_gib: float = RunOptions.moment_gib,
    progress: bool = True,
) -> Iterator[Report]:
    """Compresses a model at several sizes from the same spectra.

    The model is compressed while the caller handles each report, and dense again afterwards.

    Args:
        model: The dense model.
        config: Metric, rule and targets; its goal is replaced by each ratio.
        param_ratios: Kept shares of the targeted parameters.
        calibration: As in `compress`, as all that follow.
        evaluation: Batches for the reports' before and after.
        held_out: Batches for searches, prices and recovery.
        foreign: Batches of another kind, for the reports, too.
        loss_function: Loss of a batch.
        recover_steps: Steps of training the factors after each cut.
        recover: What they train.
        speed: Whether to time the model before and after.
        cache_dir: Folder for moments and spectra.
        moment_gib: Memory for moments, GiB.
        progress: Whether to show progress bars.

    Yields:
        One report for each ratio.

    Raises:
        ConfigError, TargetError, DataError: Before anything is changed.
    """
    options = RunOptions(
        loss_function=loss_function,
        cache_dir=cache_dir,
        moment_gib=moment_gib,
        recover_steps=recover_steps,
        recover=recover,
        speed=speed,
        progress=progress,
    )
    if not param_ratios:
        return
    goals = dict.fromkeys(("loss_tolerance", "megabytes", "rank", "ranks"))
    recipe, run, targets, left_dense = _prepare(
        model,
        config.replace(param_ratio=param_ratios[0], **goals),
        options,
        calibration=calibration,
        held_out=held_out,
        evaluation=evaluation,
        foreign=foreign,
    )
    configs = [recipe.replace(param_ratio=ratio) for ratio in param_ratios]
    for each in configs:
        check_run(model, targets, each, run)
    dense = measure_dense(model, targets, run, left_dense)
    analysis = analyze(model, targets, configs[0], run)
    for each in configs:
        own = dataclasses.replace(run, stopwatch=Stopwatch(run.stopwatch.seconds))
        decision = decide(model, analysis.with_config(each), own)
        try:
            yield apply_(model, decision, dense, own)
        finally:
            make_dense_again_(model, dense.layers)


def _prepare(
    model: nn.Module,
    config: LowRankConfig,
    options: RunOptions,
    **batches: Iterable[Batch] | None,
) -> tuple[LowRankConfig, Run, dict[str, nn.Module], dict[str, str]]:
    """The config with its recipe, the run, the targets, and why others stay dense."""
    texts = read_texts(model, options.loss_function, **batches)
    recipe = recipe_of(model, config, texts, options.loss_function)
    check_stages(recipe, options.stages, options.recover_steps)
    split = split_texts(recipe, texts, options.recover_steps)
    split = with_dense_embeddings(model, split, options.loss_function)
    run = Run(split, options, processes=current_processes())
    targets, left_dense = run_targets(model, recipe, run)
    run, others = with_experts(model, recipe, run)
    recipe = possible_recipe(model, config, recipe, targets, run.experts)
    return recipe, run, targets, left_dense | others


def check_run(
    model: nn.Module, targets: Mapping[str, nn.Module], config: LowRankConfig, run: Run
) -> None:
    """Refuses what can't be done to this model, before any long work.

    Raises:
        ConfigError, DataError, TargetError: With the reason.
    """
    texts, options = run.texts, run.options
    check_goal(targets, config)
    if config.objective == "latency" and run.experts:
        raise ConfigError(
            "objective 'latency' does not know what fused experts take to run; leave it out."
        )
    check_quantizable(targets, config.weights or ("int4" if config.megabytes else None))
    check_size_goal(model, targets, config, run.experts)
    if config.channels:
        blocks = find_feed_forwards(model, targets, run.experts)
        if not run.experts:
            check_channels(blocks, targets, config)
    if config.measured_prices and config.ranks is None:
        check_prices(texts.held_out or [])
    if recovery_settings(options.recover, options.recover_steps, config.seed):
        embedding = embedding_loss(model, options.loss_function)
        check_recoverable(model, texts.calibration or [], texts.held_out or [], embedding)

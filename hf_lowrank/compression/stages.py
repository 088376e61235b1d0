"""Compression in stages: cut part of the way, train, merge, measure the moments anew, cut again.

Each stage prices what it drops at the model as the stages before left it. The teacher of every
training is the dense model.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from hf_lowrank.compression.application import Dense, cut_, dense_on_error
from hf_lowrank.compression.options import Run
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.rebuild import compressed_layers
from hf_lowrank.modeling.surgery import merge_
from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Stage
from hf_lowrank.value_checks import check_count


def check_stages(config: LowRankConfig, stages: int, recover_steps: int) -> None:
    """Refuses stages that can't be made.

    Raises:
        ConfigError: There are fewer than one, or there are several without a size to reach or
            without a step of training for each.
    """
    check_count("stages", stages)
    if stages == 1:
        return
    if config.ranks is not None:
        raise ConfigError(
            "The config's ranks are made again in one cut; give no stages, or no ranks."
        )
    if config.goal != "param_ratio":
        raise ConfigError("stages need a size to reach: set param_ratio.")
    if config.objective == "latency":
        raise ConfigError("stages count parameters: leave out objective 'latency'.")
    if recover_steps <= stages:
        raise ConfigError(
            f"stages={stages} needs training after every cut: set recover_steps to at least "
            f"{stages + 1}."
        )


def stage_goals(param_ratio: float, stages: int, steps: int) -> list[tuple[float, int]]:
    """Size and steps of training of each stage: even cuts; the last has two shares of the steps."""
    share = steps // (stages + 1)
    earlier = [(1 - (1 - param_ratio) * k / stages, share) for k in range(1, stages)]
    return [*earlier, (param_ratio, steps - share * (stages - 1))]


def compress_in_stages_(model: nn.Module, config: LowRankConfig, dense: Dense, run: Run) -> Report:
    """Reaches a size in several cuts with training in between, in place.

    Args:
        model: The dense causal language model.
        config: What to do; its goal is a `param_ratio`.
        dense: The model before anything was cut.
        run: Text by role, with held-out text; `recover_steps` are those of all stages.

    Returns:
        The last stage's report against the dense model, with the seconds of all stages, and what
        the earlier ones did in `stages`.
    """
    ratio, options = config.param_ratio or 1.0, run.options
    with dense_on_error(model, dense.layers):
        earlier = earlier_stages(model, config, dense, run)
        steps = stage_goals(ratio, options.stages, options.recover_steps)[-1][1]
        last = dataclasses.replace(run, options=dataclasses.replace(options, recover_steps=steps))
        report = cut_(model, _layers_now(model, dense), config, dense, last)
    stages = [
        Stage(
            param_ratio=stage.config.param_ratio or 1.0,
            predicted_loss_difference=stage.predicted_loss_difference,
            recovery=stage.recovery,
            measured_prices=stage.measured_prices,
            failures=stage.failures,
        )
        for stage in [*earlier, report]
    ]
    # What was predicted is for the last cut alone.
    return dataclasses.replace(
        report, stages=stages, predicted_loss_difference=None, predicted_standard_error=None
    )


def earlier_stages(model: nn.Module, config: LowRankConfig, dense: Dense, run: Run) -> list[Report]:
    """Makes all stages but the last, in place; the model is merged after each.

    Returns:
        A report for each, without an evaluation.
    """
    options, reports = run.options, []
    goals = stage_goals(config.param_ratio or 1.0, options.stages, options.recover_steps)
    unread = dataclasses.replace(run.texts, evaluation=None, foreign=None)
    for ratio, steps in goals[:-1]:
        own = dataclasses.replace(options, recover_steps=steps, speed=False)
        part = dataclasses.replace(run, texts=unread, options=own)
        sized = config.replace(param_ratio=ratio, weights=None)
        reports.append(cut_(model, _layers_now(model, dense), sized, dense, part))
        if compressed_layers(model):  # else there was nothing to drop
            with run.stopwatch.phase("surgery"):
                merge_(model)
    return reports


def _layers_now(model: nn.Module, dense: Dense) -> dict[str, nn.Module]:
    """The targeted layers as the stages so far have left them."""
    return {name: model.get_submodule(name) for name in dense.layers}

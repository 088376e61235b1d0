"""Compression in stages: cut part of the way, train, merge, measure the moments anew, cut again.

Each stage prices what it drops at the model as the stages before left it. The teacher of every
training is the dense model.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from hf_lowrank.compression.run import CompressionRun, RunOptions, Texts, check_goal
from hf_lowrank.config import SEARCH_NAMES, LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.modeling_lowrank import compressed_layers
from hf_lowrank.modeling.marks import attach_config
from hf_lowrank.modeling.surgery import merge_, restore_
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.schema import Report


def check_stages(config: LowRankConfig, stages: int, recover_steps: int) -> None:
    """Refuses stages that can't be made.

    Raises:
        ConfigError: There are fewer than one, or there are several without a size to reach or
            without a step of training for each, or with a rule that searches for ranks.
    """
    if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
        raise ConfigError(f"stages must be an integer >= 1, got {stages!r}.")
    if stages == 1:
        return
    if config.ranks is not None:
        raise ConfigError(
            "The config's ranks are made again in one cut; give no stages, or no ranks."
        )
    if config.goal != "param_ratio":
        raise ConfigError("stages need a size to reach: set param_ratio.")
    if config.effective_rule in SEARCH_NAMES:
        raise ConfigError(
            f"rule {config.effective_rule!r} would give layers back ranks that an earlier stage "
            "took; choose another rule, or give no stages."
        )
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


def compress_in_stages(
    model: nn.Module, config: LowRankConfig, texts: Texts, options: RunOptions
) -> Report:
    """Reaches a size in several cuts with training in between, in place.

    Args:
        model: The dense causal language model.
        config: What to do; its goal is a `param_ratio`.
        texts: Text by role, with held-out text.
        options: How to work, as `check_stages` allows it; `recover_steps` are those of all stages.

    Returns:
        The last stage's report against the dense model, with the seconds of all stages, and what
        the earlier ones did in `stages`.

    Raises:
        ConfigError: See `check_goal`; nothing has been done then.
    """
    check_goal(find_targets(model, config), config)
    with earlier_stages(model, config, texts, options) as (dense, earlier):
        _, steps = stage_goals(config.param_ratio or 1.0, options.stages, options.recover_steps)[-1]
        last = dataclasses.replace(options, recover_steps=steps)
        run = CompressionRun(model, config, texts, last, dense)
        report = run.apply(*run.choose())
    for stage in earlier:
        for phase, seconds in stage.seconds.items():
            report.seconds[phase] = report.seconds.get(phase, 0.0) + seconds
    report.stages = [
        {
            "param_ratio": stage.config["param_ratio"],
            "predicted_loss_difference": stage.predicted_loss_difference,
            "recovery": stage.recovery,
            "measured_prices": stage.measured_prices,
            "failures": stage.failures,
        }
        for stage in [*earlier, report]
    ]
    report.predicted_loss_difference = None  # that of the last cut alone
    return report


@contextmanager
def earlier_stages(
    model: nn.Module, config: LowRankConfig, texts: Texts, options: RunOptions
) -> Iterator[tuple[Mapping[str, nn.Module], list[Report]]]:
    """The model as all stages but the last leave it, merged; dense again if the block fails.

    Yields:
        The dense layers by name, and the reports of the stages.
    """
    dense = find_targets(model, config)
    reports = []
    goals = stage_goals(config.param_ratio or 1.0, options.stages, options.recover_steps)
    try:
        for ratio, steps in goals[:-1]:
            sized = config.replace(param_ratio=ratio)
            reports.append(_stage(model, sized, texts, options, steps, dense))
            start = time.perf_counter()
            if compressed_layers(model):  # else there was nothing to drop
                merge_(model)
            reports[-1].seconds["surgery"] += time.perf_counter() - start
        yield dense, reports
    except BaseException:
        restore_(model, dense)
        attach_config(model, None)
        raise


def _stage(
    model: nn.Module,
    config: LowRankConfig,
    texts: Texts,
    options: RunOptions,
    steps: int,
    dense: Mapping[str, nn.Module],
) -> Report:
    """One stage before the last; its spectra are gone when it returns."""
    texts = dataclasses.replace(texts, evaluation=None, foreign=None)
    options = dataclasses.replace(options, recover_steps=steps, speed=False)
    run = CompressionRun(model, config, texts, options, dense)
    return run.apply(*run.choose())

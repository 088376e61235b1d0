"""`compress_jointly`: ranks and factors that the gradient had a say in, kept only if they help.

Every candidate is judged by a forward pass on the acceptance set. The first candidate is plain
`kfac` with the `price` rule, so the result is never worse there.
See docs/methods.md, 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.application import apply_, measure_dense
from hf_lowrank.compression.decision import Decision, held_out_loss
from hf_lowrank.compression.goals import check_goal
from hf_lowrank.compression.gradients import collect_gradients
from hf_lowrank.compression.joint.candidates import Candidate, Candidates, JointSettings
from hf_lowrank.compression.joint.disjoint import check_disjoint
from hf_lowrank.compression.options import Run, RunOptions, Texts, read_texts, run_targets
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.embeddings import embedding_loss
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.modeling.weight_precision import check_quantizable
from hf_lowrank.ranks.tolerance import Probe
from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Joint


def compress_jointly(
    model: nn.Module,
    config: LowRankConfig,
    gradient: Iterable[Batch],
    acceptance: Iterable[Batch],
    reported: Iterable[Batch] | None = None,
    *,
    foreign: Iterable[Batch] | None = None,
    settings: JointSettings | None = None,
    loss_function: LossFunction | None = None,
    speed: bool = False,
    cache_dir: str | Path | None = None,
    moment_gib: float = RunOptions.moment_gib,
    progress: bool = True,
) -> Report:
    """Factorizes a model in place, with ranks and factors steered along the gradient.

    With `param_ratio` the candidate of the smallest loss on the acceptance set wins; with
    `loss_tolerance` (0: no rise at all) the smallest model within it. If anything goes wrong, the
    model is as it was.

    Args:
        model: The dense model; a transformers model, or any module with a `loss_function`.
        config: Goal, targets and damping; the metric is `kfac`.
        gradient: Batches for the moments and the gradient.
        acceptance: Batches that decide which candidate is kept.
        reported: Batches for the report's before and after; nothing else looks at them.
        foreign: As in `compress`.
        settings: What is tried.
        loss_function: See `RunOptions`, as all that follow.
        speed: Whether to time the model before and after.
        cache_dir: Folder for moments and spectra.
        moment_gib: Memory for moments, GiB.
        progress: Whether to show progress bars.

    Returns:
        The report, as of `compress`: its evaluation is on the reported set, `held_out` the rise on
        the acceptance set, and `joint` what was tried. The model itself is changed in place.

    Raises:
        ConfigError: The goal is `rank`, the metric or rule is another, or there are several
            processes.
        DataError: Two of the sets share an item, or a needed one is empty.
    """
    _check(config, embedding_loss(model, loss_function) is not None)
    own_loss = loss_function is None
    texts = read_texts(
        model,
        loss_function,
        calibration=gradient,
        held_out=acceptance,
        evaluation=reported,
        foreign=foreign,
    )
    _check_sets(texts)
    options = RunOptions(loss_function, cache_dir, moment_gib, speed=speed, progress=progress)
    run = Run(texts, options)
    targets, left_dense = run_targets(model, config, run, with_gradients=True)
    check_goal(targets, config)
    check_quantizable(targets, config.weights)
    dense = measure_dense(model, targets, run, left_dense)
    # Gradients need the labels of the data; a loss of one's own has no other labels.
    is_one_pass = config.label_source == "data" or not own_loss
    analysis = analyze(model, targets, config, run, with_gradients=is_one_pass)
    if not is_one_pass:
        with run.stopwatch.phase("gradient"):
            gradients = collect_gradients(model, targets, texts.calibration or [], config)
            analysis = dataclasses.replace(analysis, gradients=gradients)
    candidates = Candidates(model, analysis, held_out_loss(model, run), settings or JointSettings())
    with run.stopwatch.phase("search"):
        baseline, accepted, probes = _search(candidates, config)
    decision = _decision(analysis, candidates, baseline, accepted, probes)
    return apply_(model, decision, dense, run)


def _search(
    candidates: Candidates, config: LowRankConfig
) -> tuple[Candidate, Candidate, list[Probe]]:
    """Plain `price`, the accepted candidate, and the steps that led there."""
    if config.param_ratio is None:
        return candidates.smallest_within(config.effective_tolerance)
    return *candidates.best_at(config.param_ratio), []


def _decision(
    analysis: Analysis,
    candidates: Candidates,
    baseline: Candidate,
    accepted: Candidate,
    probes: Sequence[Probe],
) -> Decision:
    """The accepted candidate, which keeps the prices of the plain spectra."""
    joint = Joint(
        method=accepted.name,
        baseline=baseline.difference,
        baseline_ratio=baseline.plan.param_ratio,
        trials=list(candidates.known.values()),
        decompositions=candidates.decompositions,
    )
    chosen = dataclasses.replace(analysis, factors=dict(accepted.factors))
    return Decision(chosen, accepted.plan, probes, accepted.difference, joint=joint)


def _check_sets(texts: Texts) -> None:
    if not texts.calibration or not texts.held_out:
        raise DataError(
            f"Joint compression needs batches for the gradient and for acceptance, got "
            f"{len(texts.calibration or [])} and {len(texts.held_out or [])}; pass gradient and "
            "acceptance."
        )
    check_disjoint(gradient=texts.calibration, acceptance=texts.held_out, reported=texts.evaluation)


def _check(config: LowRankConfig, keeps_embeddings: bool) -> None:
    if keeps_embeddings:
        raise ConfigError(
            "Joint compression follows the loss gradient, and the distance to a model's own "
            "embeddings has none; use compress."
        )
    if config.metric != "kfac" or config.rule not in (None, "price"):
        raise ConfigError(
            f"Joint compression works with metric 'kfac' and rule 'price', got {config.metric!r} "
            f"and {config.rule!r}; set these, or use compress."
        )
    if config.channels or config.measured_prices:
        raise ConfigError(
            "Joint compression takes neither channels nor measured_prices; leave both out."
        )
    if config.goal in ("megabytes", "rank") or config.ranks is not None:
        raise ConfigError("Joint compression chooses the ranks: set param_ratio or loss_tolerance.")
    if current_processes().count > 1:
        raise ConfigError("Joint compression runs in one process; start it without torchrun.")

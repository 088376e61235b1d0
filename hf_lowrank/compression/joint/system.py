"""`compress_jointly`: ranks and factors that the gradient had a say in, kept only if they help.

Every candidate is judged by a forward pass on the acceptance set. The first candidate is plain
`kfac` with the `price` rule, so the result is never worse there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_lowrank.compression.joint.candidates import Candidates, JointSettings
from hf_lowrank.compression.joint.disjoint import check_disjoint
from hf_lowrank.compression.joint.gradients import GradientReader
from hf_lowrank.compression.run import CompressionRun, RunOptions, Texts
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.losses import Batch
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.tolerance import LossDifference, Probe
from hf_lowrank.report.schema import Report
from hf_lowrank.report.spectra import compact_spectra


@dataclass
class JointResult:
    """Result of `compress_jointly`.

    Attributes:
        report: As of `compress`; its evaluation is on the reported set, `held_out` is the rise
            on the acceptance set.
        method: Name of the accepted candidate, "price" if nothing did better.
        baseline: Rise of plain `kfac` with `price` on the acceptance set, at the same size, or
            at its own smallest size for a tolerance.
        baseline_ratio: Kept share of the baseline.
        trials: Name, kept share and rise of every candidate measured; one that was clearly worse
            than the best before all items were read is not `complete`.
        decompositions: Matrices decomposed, corrections included.
    """

    report: Report
    method: str
    baseline: LossDifference
    baseline_ratio: float
    trials: list[dict[str, Any]]
    decompositions: int


def compress_jointly(
    model: nn.Module,
    config: LowRankConfig,
    gradient: Sequence[Batch],
    acceptance: Sequence[Batch],
    reported: Sequence[Batch] | None = None,
    *,
    foreign: Sequence[Batch] | None = None,
    settings: JointSettings | None = None,
    **options: Any,
) -> JointResult:
    """Factorizes a model in place, with ranks and factors steered along the gradient.

    With `param_ratio` the candidate of the smallest loss on the acceptance set wins; with
    `loss_tolerance` (0: no rise at all) the smallest model within it.

    Args:
        model: The dense model; a transformers model, or any module with a `loss_function`.
        config: Goal, targets and damping; the metric is `kfac`.
        gradient: Batches for the moments and the gradient.
        acceptance: Batches that decide which candidate is kept.
        reported: Batches for the report's before and after; nothing else looks at them.
        foreign: As in `compress`.
        settings: What is tried.
        **options: Fields of `RunOptions`, without `recover_steps` and `stages`.

    Returns:
        The report and what was tried. The model itself is changed in place.

    Raises:
        ConfigError: The goal is `rank`, the metric or rule is another, or there are several
            processes.
        DataError: Two of the sets share an item, or a needed one is empty.
    """
    chosen = RunOptions(**options)
    _check(config, chosen)
    if not gradient or not acceptance:
        raise DataError("Joint compression needs batches for the gradient and for acceptance.")
    check_disjoint(gradient=gradient, acceptance=acceptance, reported=reported)
    reader = GradientReader(config)
    # Gradients need the labels of the data; a loss of one's own has no other labels.
    is_one_pass = config.label_source == "data" or chosen.loss_function is not None
    texts = Texts(gradient, acceptance, reported, foreign)
    run = CompressionRun(model, config, texts, chosen, reader=reader if is_one_pass else None)
    if not is_one_pass:
        with run.stopwatch.phase("gradient"):
            reader.collect(model, find_targets(model, config), gradient)
    candidates = Candidates(run, settings or JointSettings(), reader)
    with run.stopwatch.phase("search"):
        if config.param_ratio is not None:
            baseline, accepted = candidates.best_at(config.param_ratio)
            probes: list[Probe] = []
        else:
            baseline, accepted, probes = candidates.smallest_within(config.effective_tolerance)
    plain = run.analysis
    run.analysis = dataclasses.replace(plain, spectra=dict(accepted.spectra))
    report = run.apply(accepted.plan, probes, accepted.difference)
    # Corrected factors have neither prices nor dropped components: those of the ranks are shown.
    report.spectra = compact_spectra(plain.spectra)
    report.predicted_loss_difference = plain.predicted_rise(accepted.plan)
    trials = [
        {"name": each.name, "param_ratio": each.param_ratio} | dataclasses.asdict(each.difference)
        for each in candidates.known.values()
    ]
    report.joint = {
        "method": accepted.name,
        "baseline": dataclasses.asdict(baseline.difference),
        "baseline_ratio": baseline.plan.param_ratio,
        "trials": trials,
        "decompositions": candidates.decompositions,
    }
    return JointResult(
        report,
        accepted.name,
        baseline.difference,
        baseline.plan.param_ratio,
        trials,
        candidates.decompositions,
    )


def _check(config: LowRankConfig, options: RunOptions) -> None:
    if config.metric != "kfac" or config.rule not in (None, "price"):
        raise ConfigError("Joint compression works with metric 'kfac' and rule 'price' only.")
    if config.channels or config.measured_prices:
        raise ConfigError("Joint compression takes neither channels nor measured_prices.")
    if config.goal == "rank" or config.ranks is not None:
        raise ConfigError("Joint compression chooses the ranks: set param_ratio or loss_tolerance.")
    if current_processes().count > 1:
        raise ConfigError("Joint compression runs in one process.")
    if options.recover_steps:
        raise ConfigError("recover_steps judges by the acceptance set; recover afterwards instead.")
    if options.stages != 1:
        raise ConfigError("Joint compression is one cut; give no stages.")

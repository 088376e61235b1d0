"""`apply_`: puts a decision into the model, measures what came of it, and reports.

A verb finishes or leaves the model as it was: whatever goes wrong after the cut, the dense layers
and the config are put back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.decision import Decision, decide
from hf_lowrank.compression.options import Run
from hf_lowrank.compression.recovery import recover_, recovery_settings
from hf_lowrank.config import LowRankConfig
from hf_lowrank.evaluation.encoder_speed import encoder_speed
from hf_lowrank.evaluation.perplexity import LossMeasurement, measure_loss
from hf_lowrank.evaluation.size import DenseSize, compare, report_fields, weight_bytes
from hf_lowrank.evaluation.speed import speed_before_and_after
from hf_lowrank.format.layout import Precision
from hf_lowrank.measuring.embeddings import embedding_loss
from hf_lowrank.measuring.items import is_causal_lm
from hf_lowrank.modeling.marks import attach_config_
from hf_lowrank.modeling.surgery import factorize_, restore_
from hf_lowrank.modeling.weight_precision import Weights, planned_precisions, quantize_weights_
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.embedding_report import EmbeddingDistance, EmbeddingReport
from hf_lowrank.report.quantization import MIXED, Quantization
from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Data, Evaluation, Recovery, Settings, Sizes
from hf_lowrank.report.spectra import compact_spectra

Times = TypeVar("Times")


@dataclass(frozen=True)
class Dense:
    """The model before anything was cut: what to put back, and what to compare with.

    Attributes:
        layers: Its targeted layers by name, and experts and routers that may be made smaller.
        size: How large the whole model is.
        losses: On each text that the report measures, by the name of its field.
        left_dense: Reason by name, of layers that were asked for and can't be factorized.
    """

    layers: Mapping[str, nn.Module]
    size: DenseSize
    losses: Mapping[str, LossMeasurement] = field(default_factory=dict)
    left_dense: Mapping[str, str] = field(default_factory=dict)


def measure_dense(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    run: Run,
    left_dense: Mapping[str, str] | None = None,
) -> Dense:
    """What must be known of a dense model before it is cut."""
    losses = _measure(model, "evaluate dense", run)
    experts = {name: model.get_submodule(name) for name in run.experts}
    routers = {name: model.get_submodule(name) for name in run.experts.values() if name}
    size = DenseSize.of(model, {**targets, **experts})
    return Dense({**targets, **experts, **routers}, size, losses, left_dense or {})


@contextmanager
def dense_on_error(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The dense layers and the unmarked config are back if the block fails, however it does."""
    try:
        yield
    except BaseException:
        make_dense_again_(model, layers)
        raise


def make_dense_again_(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Puts the dense layers back and takes the marks off the config, in place."""
    restore_(model, layers)
    attach_config_(model, None)


def cut_(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: LowRankConfig,
    dense: Dense,
    run: Run,
) -> Report:
    """Analyzes, decides and applies, in place."""
    analysis = analyze(model, targets, config, run)
    return apply_(model, decide(model, analysis, run), dense, run)


def apply_(model: nn.Module, decision: Decision, dense: Dense, run: Run) -> Report:
    """Puts a plan into the model, trains it if asked to, measures it and reports.

    Args:
        model: The model that was analyzed.
        decision: What to do to it.
        dense: The model before anything was cut.
        run: Texts, and how to work.

    Raises:
        NumericalError: A loss is NaN or infinite; the model is then dense again, as after any
            other exception.
    """
    analysis, plan, config = decision.analysis, decision.plan, decision.analysis.config
    with dense_on_error(model, dense.layers):
        with run.stopwatch.phase("surgery"):
            cut_layers = factorize_(model, analysis.factors, plan, analysis.orders)
            decided = decided_config(config, plan)
            attach_config_(model, decided)
        recovery = _recover_(model, config, dense, run)
        quantization = quantize_(model, plan.ranks, config, run, decision.bits)
        if quantization is not None:
            attach_config_(model, decided)
        report = report_on(model, decision, decided, dense, run, is_cut=bool(cut_layers))
        report.recovery, report.quantization = recovery, quantization
        return report


def decided_config(config: LowRankConfig, plan: RankPlan) -> LowRankConfig:
    """The config with what was decided, as a checkpoint holds it."""
    narrowed = {name: list(shape) for name, shape in plan.narrowed.items()} or None
    found: dict[str, Any] = {"ranks": dict(plan.ranks), "narrowed": narrowed}
    return config.replace(**found, form=plan.form)


def report_on(
    model: nn.Module,
    decision: Decision,
    decided: LowRankConfig,
    dense: Dense,
    run: Run,
    *,
    is_cut: bool,
) -> Report:
    """Measures a compressed model and reports.

    Args:
        model: The model after the cut.
        decision: What was done to it.
        decided: Its config.
        dense: The model before.
        run: Texts, and how to work.
        is_cut: Whether any layer was cut, so that there is something to time.
    """
    analysis, plan = decision.analysis, decision.plan
    after = _measure(model, "evaluate compressed", run)
    evaluations = {name: compare(dense.losses[name], after[name]) for name in after}
    kind, measured = _judged(model, evaluations, dense, run, is_cut=is_cut)
    predicted = analysis.predicted_rise(plan)
    return kind(
        **measured,
        **report_fields(model, dense.size, plan),
        model=str(getattr(getattr(model, "config", None), "_name_or_path", "") or "model"),
        config=Settings.of(decided),
        seed=decided.seed,
        predicted_loss_difference=None if math.isnan(predicted) else predicted,
        predicted_standard_error=analysis.standard_error(plan),
        predicted_time=analysis.times.of_plan(plan) if analysis.times is not None else {},
        seconds=dict(run.stopwatch.seconds),
        probes=list(decision.probes),
        held_out=decision.held_out,
        size_trials=list(decision.size_trials),
        measured_prices=list(decision.parts),
        failures={**dense.left_dense, **analysis.failures},
        data=Data(calibration_tokens=analysis.tokens),
        spectra=compact_spectra(analysis.spectra),
        joint=decision.joint,
    )


def quantize_(
    model: nn.Module,
    names: Iterable[str],
    config: LowRankConfig,
    run: Run,
    bits: Mapping[str, int] | None = None,
) -> Quantization | None:
    """Quantizes the weights of targeted layers, in place; None if nothing is to be done.

    A config that holds the decision, as a checkpoint's does, is replayed.

    Args:
        model: The model after the cut.
        names: Its targeted layers.
        config: Says of which type the weights are.
        run: Times the work.
        bits: By matrix, where types are mixed.
    """
    precisions = decided_precisions(model, names, config, bits)
    if precisions is None:
        return None
    with run.stopwatch.phase("quantization"):
        size, every = weight_bytes(model, precisions), planned_precisions(model, names, "int8")
        quantize_weights_(model, precisions)
        sizes = Sizes(size, weight_bytes(model, precisions))
        return quantization_of(config, precisions, sizes, len(every))


def decided_precisions(
    model: nn.Module,
    names: Iterable[str],
    config: LowRankConfig,
    bits: Mapping[str, int] | None = None,
) -> dict[str, Precision] | None:
    """Precision by matrix, see `quantize_`; None if all stay as they are."""
    weights: Weights = bits or config.weights
    decided = None if config.ranks is None else config.quantized
    if decided is not None:
        return {name: Precision.from_json(name, each) for name, each in decided.items()}
    return planned_precisions(model, names, weights) if weights else None


def quantization_of(
    config: LowRankConfig, precisions: Mapping[str, Precision], sizes: Sizes, matrices: int
) -> Quantization:
    """What a report says of quantized weights.

    Args:
        config: Says of which type they are.
        precisions: By matrix.
        sizes: Of these matrices, before and after.
        matrices: How many there are with those that stay as they are.
    """
    groups = Counter(max(each.block) for each in precisions.values() if each.bits == 4)
    return Quantization(
        weights=config.weights or MIXED,
        matrices=len(precisions),
        groups={str(size): count for size, count in sorted(groups.items())},
        bytes=sizes,
        kept=matrices - len(precisions),
    )


def _measure(model: nn.Module, description: str, run: Run) -> dict[str, LossMeasurement]:
    """Losses on each text that the report measures, by the name of its field."""
    if not run.texts.reported:
        return {}
    with run.stopwatch.phase("evaluation"):
        return {
            name: measure_loss(
                model,
                batches,
                loss_function=run.options.loss_function,
                progress=description if run.progress else None,
            )
            for name, batches in run.texts.reported.items()
        }


def _recover_(model: nn.Module, config: LowRankConfig, dense: Dense, run: Run) -> Recovery | None:
    """The training after the cut, None without steps."""
    settings = recovery_settings(run.options.recover, run.options.recover_steps, config.seed)
    if settings is None:
        return None
    calibration, held_out = run.texts.calibration or [], run.texts.held_out or []
    with run.stopwatch.phase("recovery"):
        loss = embedding_loss(model, run.options.loss_function)
        return recover_(model, dense.layers, calibration, held_out, settings, run.progress, loss)


def _judged(
    model: nn.Module,
    evaluations: Mapping[str, Evaluation],
    dense: Dense,
    run: Run,
    *,
    is_cut: bool,
) -> tuple[type[Report], dict[str, Any]]:
    """The kind of report, and its fields for quality and speed."""
    loss = embedding_loss(model, run.options.loss_function)
    if loss is None:
        timed = speed_before_and_after if is_cut and is_causal_lm(model) else None
        return Report, {**evaluations, "speed": _speed(timed, model, dense, run)}
    texts = {"evaluation": "distance", "foreign_evaluation": "foreign_distance"}
    fields: dict[str, Any] = {
        texts[name]: EmbeddingDistance.of(found, loss.normalize)
        for name, found in evaluations.items()
    }
    fields["encoder_speed"] = _speed(encoder_speed if is_cut else None, model, dense, run)
    return EmbeddingReport, fields | {"pooling": loss.pooling, "normalize": loss.normalize}


def _speed(
    timed: Callable[[nn.Module, Mapping[str, nn.Module]], Times | None] | None,
    model: nn.Module,
    dense: Dense,
    run: Run,
) -> Times | None:
    """Timed by the main process while the others wait, so that they do not disturb it."""
    if timed is None or not run.options.speed:
        return None
    with run.stopwatch.phase("speed"):
        return run.processes.decide(timed(model, dense.layers) if run.processes.is_main else None)

"""What the card of a model says that was fine-tuned on a task, and compressed or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from hf_lowrank.report.card.card_parts import (
    COMMON_LIMITS,
    CardParts,
    base_link,
    base_name,
    is_factorized,
    kept_share,
    layers_note,
    model_kind,
    sentences,
)
from hf_lowrank.report.card.text_card import card_parts
from hf_lowrank.report.text.table import counted, describe_run, number, warnings
from hf_lowrank.tasks.task_report import DevelopmentLoss, TaskReport
from hf_lowrank.training.switch import Switch


@card_parts.register
def task_card_parts(report: TaskReport) -> CardParts:
    """The parts of the card of a model whose quality is a score on a task."""
    dataset = report.data.dataset
    return CardParts(
        title=_title(report),
        intro=_intro(report),
        quality=_quality(report),
        made=_made(report),
        measured=_measured(report),
        limits=_limits(report),
        datasets=[dataset] if dataset else None,
        metrics=list(report.metrics),
        results=_results(report),
    )


def _name(report: TaskReport) -> str:
    return report.data.name or report.task


def _title(report: TaskReport) -> str:
    name = f"{base_name(report)} on {_name(report)}"
    if not is_factorized(report):
        return f"{name}, dense"
    return f"{name}, low-rank, {kept_share(report):.1%} of the parameters"


def _intro(report: TaskReport) -> str:
    start = f"{base_link(report)}, fine-tuned on {_name(report)}"
    if not is_factorized(report):
        return f"{start} by hf_lowrank.\nAll its layers are dense."
    return (
        f"{start} and made smaller by hf_lowrank:\n{layers_note(report, 'the method named below')}"
    )


def _results(report: TaskReport) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=model_kind(report).tag or "other",
            dataset_type=report.data.dataset or report.task,
            dataset_name=_name(report),
            dataset_config=report.data.config,
            dataset_split=report.data.split,
            metric_type=name,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in report.metrics.items()
        if number(value, "") != "-"
    ]


def _quality(report: TaskReport) -> list[list[str]]:
    found = report.parameters
    counts = [f"{found.targeted_dense:,}", f"{found.targeted_kept:,}"]
    rows = [["in the encoder's linear layers", *counts, f"{found.targeted_share:.1%}"]]
    for name, value in report.metrics.items():
        before = report.dense_metrics.get(name)
        rows.append([name, number(before, ".4f"), number(value, ".4f"), ""])
    return rows


def _made(report: TaskReport) -> str:
    """The steps of the run, a line each."""
    given = report.arguments
    dense = counted(given["dense_epochs"], "epoch")
    lines = [
        f"Dense: fine-tuned on {report.data.train_examples:,} examples for {dense} (learning rate "
        f"{given['dense_learning_rate']:g}), in batches of {given['batch_size']}."
    ]
    trained, rate = _trained(given), f"(learning rate {given['learning_rate']:g})"
    again = (
        f"for {trained} {rate}; of the start and the epochs, the one with the lowest held-out "
        "loss was kept."
    )
    if report.refusal:
        lines += [
            f"Then pruned to a density of {given['final_density']:g} in "
            f"{given['pruning_share']:.0%} of {trained} {rate}.",
            report.refusal,
        ]
    elif report.lpaf is not None:
        lines.append(
            f"Then {trained} {rate} of LPAF: weights pruned to a density of "
            f"{given['final_density']:g}, cut, tuned. {describe_run(report)}"
        )
    elif report.switch is not None:
        lines += _switched(report, report.switch)
    elif report.training is not None:
        lines.append(describe_run(report))
    elif report.method == "dense":
        lines.append(f"Then fine-tuned {again}" if trained else "")
        lines.append(f"Seed {report.seed}.")
    else:
        lines.append(f"Then cut. {_cut(report)}")
        lines.append(f"Then fine-tuned {again}" if trained else "Not trained after it.")
    if given.get("distillation_weight"):
        lines.append(
            f"The dense model's predictions were {given['distillation_weight']:.0%} of the loss in "
            "what came after it."
        )
    return "\n".join(line for line in lines if line)


def _cut(report: TaskReport) -> str:
    examples = min(report.arguments["calibration_samples"], report.data.train_examples)
    return f"{describe_run(report)} Calibration: {examples:,} of these examples."


def _switched(report: TaskReport, switch: Switch) -> list[str]:
    """The steps of Cuttlefish."""
    given = report.arguments
    reason = (
        "the stable ranks had settled"
        if switch.settled
        else f"{given['full_rank_share']:.0%} of the steps were done, the stable ranks not settled"
    )
    return [
        f"Then {_trained(given)} (learning rate {given['learning_rate']:g}) of Cuttlefish: trained "
        "at full rank up "
        f"to epoch {switch.epoch:.3g}, when {reason}; cut; the factors trained in what was left "
        "of the epochs. Of the cut model and the epochs after it, the one with the lowest held-out "
        "loss was kept.",
        _cut(report),
    ]


def _trained(given: Mapping[str, Any]) -> str | None:
    """How long the training with or after the cut was, None where there was none."""
    if given.get("steps"):
        return counted(given["steps"], "step")
    return counted(given["epochs"], "epoch") if given["epochs"] > 0 else None


def _measured(report: TaskReport) -> str:
    data = report.data
    lines = [
        f"Choices: on {data.held_out_examples:,} examples held out of the training set.",
        f"Scores: on the {data.evaluation_examples:,} examples of the development set of "
        f"{_name(report)}, used for these figures alone. One run with one seed.",
    ]
    if report.development_loss is not None:
        lines.append(f"{format_loss(report.development_loss)}.")
    if report.uncured_metrics is not None and _trained(report.arguments):
        found = ", ".join(f"{name} {value:.4f}" for name, value in report.uncured_metrics.items())
        same = "the same, " if report.uncured_metrics == report.metrics else ""
        lines.append(f"Before the last fine-tuning: {same}{found}.")
    return "\n".join(lines)


def format_loss(found: DevelopmentLoss) -> str:
    """The losses of `TaskReport.development_loss` as one line."""
    return (
        f"Mean loss on the development set: {found.dense:.4f} -> {found.compressed:.4f} nats "
        f"per {found.per or 'example'} ({found.difference:+.4f} +- {found.standard_error:.4f})"
    )


def _limits(report: TaskReport) -> list[str]:
    lines = [
        "For this task alone, measured on its development set: on other data the scores may be "
        "lower.",
        *COMMON_LIMITS[: 2 if is_factorized(report) else 1],
    ]
    if trained := _trained(report.arguments):
        lines.append(
            f"The run had {trained} of training more than the dense model beside it in the table, "
            "which can hide a loss or show a gain."
        )
    return [*lines, *sentences(warnings(report))]

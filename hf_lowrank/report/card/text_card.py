"""What the card of a model says that was compressed or trained on text."""

from __future__ import annotations

from functools import singledispatch

from huggingface_hub import EvalResult

from hf_lowrank.report.card.card_parts import (
    COMMON_LIMITS,
    CardParts,
    base_link,
    base_name,
    kept_share,
    layers_note,
    model_kind,
    sentences,
    without_folders,
)
from hf_lowrank.report.schema import Report
from hf_lowrank.report.text.speed_table import speed_notes, speed_rows
from hf_lowrank.report.text.table import describe_run, evaluations, kept_steps, number, warnings


@singledispatch
def card_parts(report: Report) -> CardParts:
    """What the card of a report says: here of a model whose quality is a loss on text.

    A kind of report with another quality registers its own parts with `card_parts.register`.
    """
    texts = (report.data.calibration or report.data.train or "").split(" + ")
    read = [name for text in texts if (name := _hub_dataset(text))]
    metrics = _metrics(report)
    return CardParts(
        title=_title(report),
        intro=(
            f"{base_link(report)}, made smaller by hf_lowrank:\n"
            f"{layers_note(report, 'its effect on the loss')}"
        ),
        quality=[*_quality(report), *speed_rows(report)],
        made=describe_run(report) + stored_note(report),
        measured=_measured(report),
        limits=_limits(report),
        datasets=read or None,
        metrics=list(metrics) if metrics else None,
        results=[
            _result(report, name, value)
            for name, value in metrics.items()
            if number(value, "") != "-"
        ]
        if metrics
        else None,
    )


def stored_note(report: Report) -> str:
    """How the weights are stored, on a line of its own, or ""."""
    if report.quantization is None:
        return ""
    return "\n" + " ".join(sentences([report.quantization.describe(), "loading needs torchao"]))


def _title(report: Report) -> str:
    return f"{base_name(report)}, low-rank, {kept_share(report):.1%} of the parameters"


def _metrics(report: Report) -> dict[str, float]:
    found = report.evaluation
    if found is None:
        return {}
    perplexity = {"perplexity": found.perplexity_after} if model_kind(report).is_text else {}
    return perplexity | {"loss": found.loss_after}


def _result(report: Report, metric: str, value: float) -> EvalResult:
    text = report.data.evaluation or ""
    dataset = _hub_dataset(text)
    parts = text.split(":") if dataset else []
    return EvalResult(
        task_type=model_kind(report).tag or "other",
        dataset_type=dataset or "text",
        dataset_name=dataset or _described(text),
        dataset_config=parts[1] if len(parts) > 1 else None,
        dataset_split=parts[2] if len(parts) > 2 else None,
        metric_type=metric,
        metric_name="mean loss (nats per token)" if metric == "loss" else metric,
        metric_value=round(value, 4),
    )


def _hub_dataset(source: str | None) -> str | None:
    """`namespace/name` of a text source on the Hub, None for files and the demo text."""
    name = (source or "").split(":")[0]
    return name if name.count("/") == 1 and without_folders(name) == name else None


def _described(source: str | None) -> str:
    built_in = {
        "demo": "the demo text of hf_lowrank (Python's own help, split by topic)",
        "demo-graphs": "docstrings of networkx",
        "demo-licenses": "the licenses of the installed packages",
    }
    if not source:
        return "text whose source was not recorded"
    if " + " in source:
        return f"a mixture ({without_folders(source)})"
    return built_in.get(source) or without_folders(source)


def _quality(report: Report) -> list[list[str]]:
    rows = []
    for what, (found, _) in evaluations(report).items():
        if model_kind(report).is_text:
            pair = [number(found.perplexity_before, ".2f"), number(found.perplexity_after, ".2f")]
            rows.append([f"perplexity{what}", *pair, ""])
        losses = [number(found.loss_before, ".4f"), number(found.loss_after, ".4f")]
        rows.append([f"loss (nats per token){what}", *losses, ""])
    return rows


def _measured(report: Report) -> str:
    lines = []
    data = report.data
    for role, tokens, source in (
        ("Calibration", data.calibration_tokens, data.calibration),
        ("Training", data.train_tokens, data.train),
    ):
        if tokens:
            lines.append(f"{role}: {tokens:,} tokens of {_described(source)}.")
    speed = sentences(speed_notes(report))
    if report.evaluation is None:
        return "\n".join([*lines, "Quality: not measured.", *speed])
    for what, (found, _) in evaluations(report).items():
        text = _described(data.foreign if what else data.evaluation)
        rise, error = number(found.loss_difference, "+.4f"), number(found.standard_error, ".4f")
        kind = "Foreign text, unlike the calibration's" if what else "Evaluation"
        lines += [
            f"{kind}: {found.tokens:,} scored tokens of {text}, used for these figures alone.",
            f"Both models read the same windows; their loss differs by {rise} ± {error} nats per "
            "token (standard error over windows).",
        ]
    return "\n".join([*lines, *speed])


def _limits(report: Report) -> list[str]:
    first = (
        f"Measured on the text{'' if report.foreign_evaluation is None else 's'} above alone: on "
        "other text, other languages and downstream tasks the loss may rise more."
    )
    if report.evaluation is None:
        first = "The quality of this model was not measured."
    lines = [first, *COMMON_LIMITS]
    if report.model == "demo" or report.model.endswith(".gguf"):
        lines.append(
            "The dense weights were read from a quantized .gguf file, so the figures of the dense "
            "model are not those of its original."
        )
    if report.training is not None or any(kept_steps(report)):
        text = "calibration" if report.training is None else "training"
        lines.append(
            f"The compressed model was also trained on the {text} text, the dense model was not: "
            "the difference is not that of the compression alone."
        )
    return [*lines, *sentences(warnings(report))]

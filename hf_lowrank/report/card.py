"""Model cards: every figure in them comes from a report."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_lowrank.report.schema import Report
from hf_lowrank.report.table import describe_run, number, rank_rows, warnings

TAGS = ["hf-lowrank", "low-rank", "compression", "svd"]
# Class name's ending: (pipeline tag, auto class, whether exp(loss) is a perplexity of text).
_TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", True),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM", True),
    "ForConditionalGeneration": ("text2text-generation", "AutoModelForSeq2SeqLM", True),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM", True),
    "ForSequenceClassification": (
        "text-classification",
        "AutoModelForSequenceClassification",
        False,
    ),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", False),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering", False),
}


def model_card(report: Report, repo_id: str, page: bool = False) -> ModelCard:
    """The README.md of a compressed model.

    Args:
        report: What was done and measured.
        repo_id: Where the model is, or will be: a Hub id or a folder.
        page: Whether a `report.html` lies beside it.
    """
    template = resources.files("hf_lowrank.report").joinpath("card_template.md")
    source = _shown(report.base_model or report.model)
    link = f"[{source}](https://huggingface.co/{source})" if report.base_model else f"`{source}`"
    card: ModelCard = ModelCard.from_template(
        card_data(report),
        template_str=template.read_text("utf-8"),
        title=_title(report),
        origin=link,
        repo=json.dumps(repo_id),
        auto_class=_task(report)[1],
        sizes=_markdown(_size_rows(report)),
        run=describe_run(report),
        ranks=_markdown(rank_rows(report)),
        measured=_measured(report),
        limits=_limits(report),
        page_note="; `report.html` shows it with figures" if page else "",
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )
    return card


def card_data(report: Report) -> ModelCardData:
    """The card's metadata; what the report does not know is left out."""
    tag, _, is_text = _task(report)
    calibration = _hub_dataset(report.data.get("calibration"))
    values: dict[str, Any] = {
        "library_name": "transformers",
        "tags": TAGS,
        "pipeline_tag": tag,
        "base_model": report.base_model,
        "datasets": [calibration] if calibration else None,
    }
    found = report.evaluation
    if found is not None:
        metrics = {"loss": found.loss_after}
        if is_text:
            metrics = {"perplexity": found.perplexity_after} | metrics
        values["metrics"] = list(metrics)
        values["model_name"] = _title(report)
        values["eval_results"] = [
            _result(report, tag, name, value)
            for name, value in metrics.items()
            if number(value, "") != "-"
        ]
    return ModelCardData(**values)


def _result(report: Report, tag: str | None, metric: str, value: float) -> EvalResult:
    text = str(report.data.get("evaluation") or "")
    dataset = _hub_dataset(text)
    parts = text.split(":") if dataset else []
    return EvalResult(
        task_type=tag or "other",
        dataset_type=dataset or "text",
        dataset_name=dataset or _described(text),
        dataset_config=parts[1] if len(parts) > 1 else None,
        dataset_split=parts[2] if len(parts) > 2 else None,
        metric_type=metric,
        metric_name="mean loss (nats per token)" if metric == "loss" else metric,
        metric_value=round(value, 4),
    )


def _title(report: Report) -> str:
    kept = report.parameters["kept"] / report.parameters["dense"]
    name = PurePath(_shown(report.base_model or report.model)).name
    return f"{name}, low-rank, {kept:.1%} of the parameters"


def _task(report: Report) -> tuple[str | None, str, bool]:
    ending = next((end for end in _TASKS if report.architecture.endswith(end)), None)
    return _TASKS[ending] if ending else (None, "AutoModel", False)


def _hub_dataset(source: Any) -> str | None:  # noqa: ANN401
    """`namespace/name` of a text source on the Hub, None for files and the demo text."""
    name = str(source or "").split(":")[0]
    is_file = PurePath(name).suffix in (".txt", ".jsonl", ".parquet", ".raw", ".json", ".gz")
    return name if name.count("/") == 1 and name[0] not in "./~" and not is_file else None


def _described(source: str) -> str:
    if source == "demo":
        return "the demo text of hf_lowrank (Python's own help, split by topic)"
    return _shown(source) or "text whose source was not recorded"


def _shown(source: str) -> str:
    """A source without the folders of the machine that it was on."""
    is_path = source[:1] in ("/", ".", "~") or "\\" in source or source.count("/") > 1
    return PurePath(source.replace("\\", "/")).name if is_path else source


def _size_rows(report: Report) -> list[list[str]]:
    parameters, size, found = report.parameters, report.bytes, report.evaluation
    kept = parameters["kept"] / parameters["dense"]
    rows = [
        ["", "dense", "compressed", "kept"],
        ["parameters", f"{parameters['dense']:,}", f"{parameters['kept']:,}", f"{kept:.1%}"],
        [
            "megabytes",
            f"{size['dense'] / 1e6:.1f}",
            f"{size['kept'] / 1e6:.1f}",
            f"{size['kept'] / size['dense']:.1%}",
        ],
    ]
    if found is not None:
        before, after = found.perplexity_before, found.perplexity_after
        if _task(report)[2]:
            rows.append(["perplexity", number(before, ".2f"), number(after, ".2f"), ""])
        losses = [number(found.loss_before, ".4f"), number(found.loss_after, ".4f")]
        rows.append(["loss (nats per token)", *losses, ""])
    return rows


def _measured(report: Report) -> str:
    calibration = _described(str(report.data.get("calibration") or ""))
    tokens = report.data.get("calibration_tokens")
    lines = []
    if tokens:
        lines.append(f"Calibration: {tokens:,} tokens of {calibration}.")
    found = report.evaluation
    if found is None:
        return "\n".join([*lines, "Quality: not measured."])
    text = _described(str(report.data.get("evaluation") or ""))
    rise, error = number(found.loss_difference, "+.4f"), number(found.standard_error, ".4f")
    lines += [
        f"Evaluation: {found.tokens:,} scored tokens of {text}, used for these figures alone.",
        f"Both models read the same windows; their loss differs by {rise} ± {error} nats per token "
        "(standard error over windows).",
    ]
    return "\n".join(lines)


def _limits(report: Report) -> list[str]:
    lines = [
        "Measured on the text above alone: on other text, other languages and downstream tasks the "
        "loss may rise more.",
        "Biases and other faults of the dense model are still there; its license applies.",
        "Fewer parameters are not always less time: each low-rank layer is two matrix products.",
    ]
    if report.model == "demo" or report.model.endswith(".gguf"):
        lines.append(
            "The dense weights were read from a quantized .gguf file, so the figures of the dense "
            "model are not those of its original."
        )
    if report.evaluation is None:
        lines[0] = "The quality of this model was not measured."
    return [*lines, *(f"{line[0].upper()}{line[1:]}." for line in warnings(report))]


def _markdown(rows: list[list[str]]) -> str:
    """A table in Markdown, the first row its header."""
    marks = ["---"] + ["---:"] * (len(rows[0]) - 1)
    filled = [[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [filled[0], marks, *filled[1:]])

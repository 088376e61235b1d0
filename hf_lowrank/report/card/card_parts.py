"""What the cards of all kinds of runs share: names without folders, tables, the kind of model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from huggingface_hub import EvalResult

from hf_lowrank.ranks.plan import COMPACT
from hf_lowrank.report.schema import Report


class ModelKind(NamedTuple):
    """What follows from the class of a model.

    Attributes:
        tag: The Hub's pipeline tag, or None.
        auto_class: The class that loads it.
        is_text: Whether exp(loss) is a perplexity of text.
    """

    tag: str | None
    auto_class: str
    is_text: bool


@dataclass(frozen=True)
class CardParts:
    """What one kind of run says in its card.

    Attributes:
        title: The card's heading, and the model's name in the evaluation results.
        intro: What the model is.
        quality: Rows below those of the size: what, dense, compressed, kept.
        made: How it was made.
        measured: How it was measured.
        limits: What a reader must know.
        datasets: Hub ids of the data sets that it was made with, or None.
        metrics: Names of the metrics in `results`, or None.
        results: What was measured, or None if nothing was.
        library: The library that loads it.
        tag: The Hub's pipeline tag, where it does not follow from the model's class.
    """

    title: str
    intro: str
    quality: list[list[str]]
    made: str
    measured: str
    limits: list[str]
    datasets: list[str] | None
    metrics: list[str] | None
    results: list[EvalResult] | None
    library: str = "transformers"
    tag: str | None = None


_KINDS = {
    "ForCausalLM": ModelKind("text-generation", "AutoModelForCausalLM", True),
    "LMHeadModel": ModelKind("text-generation", "AutoModelForCausalLM", True),
    "ForConditionalGeneration": ModelKind("text2text-generation", "AutoModelForSeq2SeqLM", True),
    "ForMaskedLM": ModelKind("fill-mask", "AutoModelForMaskedLM", True),
    "ForSequenceClassification": ModelKind(
        "text-classification", "AutoModelForSequenceClassification", False
    ),
    "ForTokenClassification": ModelKind(
        "token-classification", "AutoModelForTokenClassification", False
    ),
    "ForQuestionAnswering": ModelKind("question-answering", "AutoModelForQuestionAnswering", False),
}
_LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet", ".raw", ".json", ".gz", ".gguf")
_MIXED = re.compile(r"(.*?)((?::[01]?(?:\.\d+)?)?)", re.DOTALL)  # a source and its share
COMMON_LIMITS = (
    "Biases and other faults of the dense model are still there; its license applies.",
    "Fewer parameters are not always less time: each low-rank layer is two matrix products.",
)


def model_kind(report: Report) -> ModelKind:
    """The kind of model by the ending of its class's name."""
    ending = next((end for end in _KINDS if report.architecture.endswith(end)), None)
    return _KINDS[ending] if ending else ModelKind(None, "AutoModel", False)


def is_factorized(report: Report) -> bool:
    """Whether any layer is low-rank, narrowed or quantized."""
    ranks = any(rank is not None for rank in report.ranks.values())
    shapes = bool(report.narrowed) or any(each.is_cut for each in report.experts.values())
    return ranks or shapes or report.quantization is not None


def layers_note(report: Report, effect: str) -> str:
    """What the layers of a compressed model are, with a sentence on lost channels or experts.

    Args:
        report: Of the model.
        effect: What each rank was chosen by, "its effect on the loss".
    """
    if not any(report.ranks.values()):
        return f"every layer is an ordinary one, some of them smaller.{channel_note(report)}"
    is_compact = report.config.others.get("form") == COMPACT
    what = "of low rank, in a compact form" if is_compact else "products of two thin matrices"
    note = channel_note(report)
    return f"its linear layers are {what}, with a rank for every layer chosen by {effect}.{note}"


def channel_note(report: Report) -> str:
    """Sentences for models that lost channels or experts, with a space before each, or ""."""
    note = " Some feed-forwards have fewer channels in place of factors." if report.narrowed else ""
    cut = [each for each in report.experts.values() if each.is_cut]
    return note + (" Some experts have fewer channels, or are gone." if cut else "")


def kept_share(report: Report) -> float:
    """Share of all parameters that is left."""
    return report.parameters.share


def base_name(report: Report) -> str:
    """Name of the dense model without its owner or folder."""
    return PurePath(without_folders(report.base_model or report.model)).name


def base_link(report: Report) -> str:
    """The dense model as a link, or its name alone where it is not on the Hub."""
    source = report.base_model
    if source is None:
        return f"`{without_folders(report.model)}`"
    return f"[{source}](https://huggingface.co/{source})"


def without_folders(source: str) -> str:
    """The last component of each local path of a mixture; sources on the Hub as they are."""
    return " + ".join(map(_without_folder, source.split(" + ")))


def _without_folder(source: str) -> str:
    name, share = _MIXED.fullmatch(source).groups()  # type: ignore[union-attr]
    return (last_component(name) if is_local(name) else name) + share


def is_local(source: str) -> bool:
    """Whether a source is a path: it exists on this machine, or can't be a name on the Hub."""
    return looks_local(source) or os.path.exists(source)


def looks_local(source: str) -> bool:
    """Whether a source can't be a name on the Hub."""
    is_path = source[:1] in ("/", ".", "~") or "\\" in source or source.count("/") > 1
    return is_path or PurePath(source).suffix in _LOCAL_SUFFIXES


def last_component(path: str) -> str:
    """Name of a file or folder, given with the separators of any system; "." and "/" have none."""
    return PurePath(path.replace("\\", "/")).name or path


def sentences(lines: list[str]) -> list[str]:
    """Each line with a capital letter and a full stop."""
    return [f"{line[0].upper()}{line[1:]}." for line in lines]


def markdown_table(rows: list[list[str]]) -> str:
    """A table in Markdown, the first row its header."""
    marks = ["---"] + ["---:"] * (len(rows[0]) - 1)
    filled = [[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [filled[0], marks, *filled[1:]])

"""What the card of a model says whose embeddings were to be kept."""

from __future__ import annotations

from huggingface_hub import EvalResult

from hf_lowrank.report.card.card_parts import (
    COMMON_LIMITS,
    CardParts,
    base_link,
    base_name,
    kept_share,
    last_component,
    layers_note,
    sentences,
    without_folders,
)
from hf_lowrank.report.card.text_card import card_parts, stored_note
from hf_lowrank.report.embedding_report import EmbeddingReport
from hf_lowrank.report.text.embedding_lines import embedding_notes, embedding_rows
from hf_lowrank.report.text.table import describe_run, kept_steps, warnings


@card_parts.register
def embedding_card_parts(report: EmbeddingReport) -> CardParts:
    """The parts of the card of a model whose quality is how well its embeddings were kept."""
    results = _results(report)
    return CardParts(
        title=f"{base_name(report)}, low-rank, {kept_share(report):.1%} of the parameters",
        intro=(
            f"{base_link(report)}, made smaller by hf_lowrank:\n"
            f"{layers_note(report, 'its effect on the embeddings')}"
        ),
        quality=embedding_rows(report),
        made=describe_run(report) + stored_note(report),
        measured=_measured(report),
        limits=_limits(report),
        datasets=None,
        metrics=[result.metric_type for result in results] or None,
        results=results or None,
        library="sentence-transformers",
        tag="sentence-similarity",
    )


def _results(report: EmbeddingReport) -> list[EvalResult]:
    found = report.similarity
    if found is None:
        return []
    return [
        EvalResult(
            task_type="semantic-similarity",
            dataset_type="text",
            dataset_name=last_component(found.source),
            metric_type=f"{name}_cosine",
            metric_name=f"{name.title()} correlation of cosines",
            metric_value=round(value, 4),
        )
        for name, value in (("pearson", found.pearson), ("spearman", found.spearman))
    ]


def _measured(report: EmbeddingReport) -> str:
    data, lines = report.data, []
    if data.calibration_tokens:
        text = without_folders(data.calibration or "text whose source was not recorded")
        lines.append(f"Calibration: {data.calibration_tokens:,} tokens of {text}, without labels.")
    if report.distance is None and report.similarity is None:
        lines.append("Quality: not measured.")
    if report.similarity is not None:
        found = report.similarity
        lines.append(
            f"Similarity: on {found.pairs:,} pairs of {last_component(found.source)}, used for "
            "these figures alone."
        )
    return "\n".join([*lines, *sentences(embedding_notes(report))])


def _limits(report: EmbeddingReport) -> list[str]:
    lines = [
        "On text unlike that of the calibration the embeddings may move more.",
        "Embeddings of this model and of the dense one should not be mixed in one index unless "
        "their mean cosine says that you may.",
        *COMMON_LIMITS,
    ]
    if any(kept_steps(report)):
        lines.append("After the cut it was trained towards the dense model's embeddings.")
    return [*lines, *sentences(warnings(report))]

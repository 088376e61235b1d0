"""Model cards: every figure in them comes from a report."""

from __future__ import annotations

import json
from importlib import resources

from huggingface_hub import ModelCard, ModelCardData

from hf_lowrank.report.card.card_parts import (
    CardParts,
    is_factorized,
    markdown_table,
    model_kind,
)
from hf_lowrank.report.card.embedding_card import embedding_card_parts as embedding_card_parts
from hf_lowrank.report.card.text_card import card_parts
from hf_lowrank.report.layers import expert_rows
from hf_lowrank.report.schema import Report
from hf_lowrank.report.text.table import rank_rows

TAGS = ["hf-lowrank", "low-rank", "compression", "svd"]


def model_card(report: Report, repo_id: str, page: bool = False) -> ModelCard:
    """The README.md of a model that a run made.

    Args:
        report: What was done and measured.
        repo_id: Where the model is, or will be: a Hub id or a folder.
        page: Whether a `report.html` lies beside it.
    """
    template = resources.files("hf_lowrank.report.card").joinpath("card_template.md")
    parts = card_parts(report)
    tables = [rank_rows(report), *([expert_rows(report)] if report.experts else [])]
    card: ModelCard = ModelCard.from_template(
        _card_data(report, parts),
        template_str=template.read_text("utf-8"),
        title=parts.title,
        intro=parts.intro,
        repo=json.dumps(repo_id),
        auto_class=model_kind(report).auto_class,
        factorized=is_factorized(report),
        is_embedder=parts.library == "sentence-transformers",
        sizes=markdown_table([*_size_rows(report), *parts.quality]),
        run=parts.made,
        ranks="\n\n".join(map(markdown_table, tables)),
        measured=parts.measured,
        limits=parts.limits,
        page_note="; `report.html` shows it with figures" if page else "",
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )
    return card


def _card_data(report: Report, parts: CardParts) -> ModelCardData:
    """The card's metadata; what the report does not know is left out."""
    return ModelCardData(
        library_name=parts.library,
        tags=TAGS if is_factorized(report) else TAGS[:1],
        pipeline_tag=parts.tag or model_kind(report).tag,
        base_model=report.base_model,
        datasets=parts.datasets,
        metrics=parts.metrics,
        eval_results=parts.results,
        model_name=None if parts.results is None else parts.title,
    )


def _size_rows(report: Report) -> list[list[str]]:
    parameters, size = report.parameters, report.bytes
    return [
        ["", "dense", "compressed" if is_factorized(report) else "this model", "kept"],
        [
            "parameters",
            f"{parameters.dense:,}",
            f"{parameters.kept:,}",
            f"{parameters.share:.1%}",
        ],
        [
            "megabytes",
            f"{size.dense / 1e6:.1f}",
            f"{size.kept / 1e6:.1f}",
            f"{size.share:.1%}",
        ],
    ]

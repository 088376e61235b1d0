"""How a report tells what became of embeddings, and how fast they are made."""

from __future__ import annotations

from collections.abc import Sequence

from hf_lowrank.report.embedding_report import EmbeddingDistance, EmbeddingReport, Similarity
from hf_lowrank.report.schema import Report


def embedding_rows(report: Report) -> list[list[str]]:
    """Rows of what, dense, compressed and speed-up; none of a report of another kind."""
    if not isinstance(report, EmbeddingReport):
        return []
    rows = []
    for what, found in _distances(report):
        if found.cosine is None:
            rows.append([f"half the squared distance{what}", "0.0000", f"{found.distance:.4f}"])
        else:
            rows.append([f"mean cosine to the dense embedding{what}", "1.0000", _cosine(found)])
    if report.similarity is not None:
        rows += similarity_rows(report.similarity)
    for timing in report.encoder_speed.timings if report.encoder_speed else []:
        dense, compressed = timing.sentences_per_second
        shape = f"sentences/s, {timing.batch_size} x {timing.tokens} tokens"
        rows.append([shape, f"{dense:,.1f}", f"{compressed:,.1f}", f"{compressed / dense:.2f}x"])
    return rows


def similarity_rows(found: Similarity) -> list[list[str]]:
    """Correlations with what people said, dense and compressed, in percent."""
    return [
        [f"{name} on {found.pairs:,} pairs", f"{100 * before:.2f}", f"{100 * after:.2f}"]
        for name, before, after in (
            ("Spearman", found.dense_spearman, found.spearman),
            ("Pearson", found.dense_pearson, found.pearson),
        )
    ]


def embedding_notes(report: Report) -> list[str]:
    """On how much text, and where the speed was measured."""
    if not isinstance(report, EmbeddingReport):
        return []
    pooling = report.pooling or "the model's default"
    lines = [f"embedding: pooling {pooling}, {'' if report.normalize else 'not '}normalised"]
    for what, found in _distances(report):
        text = f"foreign text ({report.data.foreign})" if what else "evaluation text"
        lines.append(
            f"distance to the dense embedding (half of its square) {found.distance:.4f} +- "
            f"{found.standard_error:.4f} over {found.items:,} items of {text}"
        )
    if report.encoder_speed is not None:
        speed = report.encoder_speed
        rounds = min(len(timing.dense) for timing in speed.timings)
        lines.append(
            f"speed on the machine of this run alone: {speed.hardware}, device {speed.device}, "
            f"{speed.threads} CPU thread{'' if speed.threads == 1 else 's'}, {speed.dtype}; "
            f"medians of {rounds} or more rounds, both models in turn"
        )
    return lines


def _distances(report: EmbeddingReport) -> Sequence[tuple[str, EmbeddingDistance]]:
    found = {"": report.distance, ", foreign text": report.foreign_distance}
    return [(what, each) for what, each in found.items() if each is not None]


def _cosine(found: EmbeddingDistance) -> str:
    return f"{found.cosine:.4f}"

"""`EmbeddingReport`: the report of a model whose embeddings were to be kept."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import ClassVar

from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Evaluation


@dataclass(frozen=True)
class EmbeddingDistance:
    """How far the compressed model's embeddings lie from the dense model's, on one text.

    Attributes:
        cosine: Their mean cosine; None where they were not normalised.
        distance: Mean of half the squared distance: 1 - cosine of normalised embeddings.
        standard_error: Of both, over items.
        items: Sentences, or images.
    """

    cosine: float | None
    distance: float
    standard_error: float
    items: int

    @classmethod
    def of(cls, found: Evaluation, normalize: bool) -> EmbeddingDistance:
        """From losses of `EmbeddingLoss`, which the dense model's own embeddings are labels of."""
        cosine = 1 - found.loss_after if normalize else None
        return cls(cosine, found.loss_after, found.standard_error, found.tokens)


@dataclass(frozen=True)
class Similarity:
    """How well cosines of sentence pairs agree with what people said (semantic similarity).

    Attributes:
        source: The file of pairs.
        pairs: How many.
        dense_pearson: Correlation of the dense model's cosines with the scores.
        dense_spearman: The same of their ranks.
        pearson: Of the compressed model.
        spearman: Of the compressed model.
    """

    source: str
    pairs: int
    dense_pearson: float
    dense_spearman: float
    pearson: float
    spearman: float


@dataclass(frozen=True)
class EncoderTiming:
    """Times of one shape of input.

    Attributes:
        batch_size: Sentences side by side.
        tokens: Of each.
        dense: Seconds of the dense model, one of each round.
        compressed: Seconds of the compressed model in the same rounds.
    """

    batch_size: int
    tokens: int
    dense: tuple[float, ...]
    compressed: tuple[float, ...]

    @property
    def sentences_per_second(self) -> tuple[float, float]:
        """Of the dense and of the compressed model, by the medians."""
        dense, compressed = map(statistics.median, (self.dense, self.compressed))
        return self.batch_size / dense, self.batch_size / compressed


@dataclass(frozen=True)
class EncoderSpeed:
    """Times of both models, taken in turn, and where.

    Attributes:
        timings: One for each shape of input.
        device: torch's name of the device.
        hardware: The processor's or the accelerator's name.
        threads: Threads of torch on the processor.
        dtype: Type of the weights.
    """

    timings: list[EncoderTiming]
    device: str
    hardware: str
    threads: int
    dtype: str


@dataclass
class EmbeddingReport(Report):
    """Result of compressing a model whose embeddings are to be kept.

    All losses in it are half the squared distance to the dense model's embeddings.

    Attributes:
        pooling: What of the output is the embedding, see `EmbeddingLoss`; None for the default.
        normalize: Whether embeddings were brought to length 1.
        distance: On evaluation text, or None if there was none.
        foreign_distance: On a text of another kind.
        similarity: On pairs of sentences, or None if there were none.
        encoder_speed: Times before and after, or None if they were not taken.
    """

    LOSS_UNIT: ClassVar[str] = "in half the squared distance"

    pooling: str | None = None
    normalize: bool = True
    distance: EmbeddingDistance | None = None
    foreign_distance: EmbeddingDistance | None = None
    similarity: Similarity | None = None
    encoder_speed: EncoderSpeed | None = field(default=None)

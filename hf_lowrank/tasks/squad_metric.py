"""SQuAD's exact match and F1 as an `evaluate.Metric` that needs no hub, and answers from logits.

Rajpurkar et al., SQuAD, EMNLP 2016; the normalisation is that of its evaluation script v1.1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_lowrank.errors import DataError

MAIN_METRIC = "f1"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Window:
    """Predictions on one window of a context.

    Attributes:
        start_logits: Logits of an answer that starts at each token, shape (tokens,).
        end_logits: Logits of an answer that ends with each token, shape (tokens,).
        char_starts: First character of each token in the context, shape (tokens,); -1 for tokens
            of the question, special ones and padding.
        char_ends: The character after each token, shape (tokens,); -1 likewise.
    """

    start_logits: np.ndarray
    end_logits: np.ndarray
    char_starts: np.ndarray
    char_ends: np.ndarray


class SquadMetric(evaluate.Metric):
    """F1 and exact match as shares of 1, in the input format of `evaluate`'s "squad".

    `predictions` are dicts of `id` and `prediction_text`, `references` of `id` and `answers` with
    the lists `text` and `answer_start`.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        answers = datasets.Sequence({"text": text, "answer_start": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description="SQuAD's metrics, computed locally",
            citation="Rajpurkar et al., SQuAD, EMNLP 2016",
            features=datasets.Features(
                {
                    "predictions": {"id": text, "prediction_text": text},
                    "references": {"id": text, "answers": answers},
                }
            ),
        )

    def _compute(
        self,
        *,
        predictions: Any = None,  # noqa: ANN401
        references: Any = None,  # noqa: ANN401
        **kwargs: Any,
    ) -> dict[str, float]:
        found = {item["id"]: item["prediction_text"] for item in predictions}
        missing = [item["id"] for item in references if item["id"] not in found]
        if missing:
            raise DataError(f"Question {missing[0]} has no prediction; give one for each.")
        return squad_scores(
            [found[item["id"]] for item in references],
            [item["answers"]["text"] for item in references],
        )


def squad_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Means over the questions of the best F1 and exact match with any gold answer, in [0, 1].

    Args:
        predictions: One answer for each question.
        references: The gold answers of each question, at least one.
    """
    pairs = list(zip(predictions, references, strict=True))

    def mean(score: Callable[[str, str], float]) -> float:
        best = (max(score(text, answer) for answer in gold) for text, gold in pairs)
        return sum(best) / len(pairs)

    return {"f1": mean(f1), "exact_match": mean(exact_match)}


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and superfluous blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """Whether both are the same when normalised: 1 or 0."""
    return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the normalised words, counted with repeats."""
    found, wanted = normalize(prediction).split(), normalize(answer).split()
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def best_answer(
    context: str, windows: Sequence[Window], *, n_best: int = 20, max_answer_length: int = 30
) -> str:
    """The span with the highest sum of start and end logit over all windows of a context.

    Args:
        context: Text that the windows were cut from; they may overlap.
        windows: Predictions on each.
        n_best: In each window, this many likeliest starts are combined with as many ends.
        max_answer_length: Most tokens of an answer.

    Returns:
        The text as it stands in the context; empty if no start and end fit together.
    """
    best, answer = -np.inf, ""
    for window in windows:
        inside = np.flatnonzero(window.char_starts >= 0)
        starts, ends = (
            inside[np.argsort(-logits[inside], kind="stable")[:n_best]]
            for logits in (window.start_logits, window.end_logits)
        )
        length = ends[None, :] - starts[:, None] + 1
        scores = window.start_logits[starts][:, None] + window.end_logits[ends][None, :]
        scores = np.where((length > 0) & (length <= max_answer_length), scores, -np.inf)
        if scores.size and scores.max() > best:
            best = scores.max()
            i, j = np.unravel_index(scores.argmax(), scores.shape)
            answer = context[window.char_starts[starts[i]] : window.char_ends[ends[j]]]
    return answer

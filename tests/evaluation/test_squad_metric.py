"""SQuAD's metrics by hand, answers against all spans."""

import numpy as np
import pytest

from hf_lowrank.errors import DataError
from hf_lowrank.tasks.squad_metric import (
    MAIN_METRIC,
    SquadMetric,
    Window,
    best_answer,
    exact_match,
    f1,
    normalize,
    squad_scores,
)

PAIRS = [
    ("The Denver Broncos", "denver broncos!", 1, 1),
    ("in a U.S. city", "the US city", 2 * 2 / (3 + 2), 0),
    ("10\u201315", "10-15", 0, 0),  # only ASCII punctuation is dropped
    ("a a b b b", "b b c", 2 * 2 / (3 + 3), 0),
    ("theatre", "atre", 0, 0),
    ("a-the b", "b", 2 / (2 + 1), 0),  # punctuation goes before articles
    ("Chlo\u00eb's", "chlo\u00ebs", 1, 1),
    ("tab\tand\nline", "tab and line", 1, 1),
    ("an answer", "another answer", 2 / (1 + 2), 0),
    ("", "x", 0, 0),
    ("the", "an", 0, 1),  # nothing is left of either: the official F1 is 0 all the same
]


@pytest.mark.parametrize(("prediction", "answer", "score", "is_same"), PAIRS)
def test_scores_of_a_pair(prediction: str, answer: str, score: float, is_same: int):
    assert f1(prediction, answer) == pytest.approx(score)
    assert exact_match(prediction, answer) == is_same


def test_figures_by_hand():
    assert normalize(" The  (first) an-swer, a\u00a0theme ") == "first answer theme"
    assert f1("b b c", "b d") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    # The best gold answer counts, for each metric on its own.
    found = squad_scores(["x y", "q"], [["x", "x y z"], ["Q.", "r"]])
    assert found == pytest.approx({"f1": (0.8 + 1) / 2, "exact_match": 0.5})
    assert next(iter(found)) == MAIN_METRIC


def test_the_metric_takes_what_the_hubs_takes():
    answers = [
        {"text": ["x y z"], "answer_start": [3]},
        {"text": ["q", "r"], "answer_start": [0, 1]},
    ]
    references = [{"id": str(i), "answers": answer} for i, answer in enumerate(answers)]
    predictions = [{"id": "1", "prediction_text": "r"}, {"id": "0", "prediction_text": "x"}]
    found = SquadMetric().compute(predictions=predictions, references=references)
    assert found == pytest.approx({"f1": 0.75, "exact_match": 0.5})
    wrong = [{"id": "1", "prediction_text": "r"}, {"id": "7", "prediction_text": "x"}]
    with pytest.raises(DataError, match="Question 0 has no prediction"):
        SquadMetric().compute(predictions=wrong, references=references)


CONTEXT = "ab cd ef gh ij kl mn op"


def window(first: int, size: int, seed: int, question: int = 3) -> Window:
    """Words `first` to `first + size` of the context, after the tokens of a question."""
    generator = np.random.default_rng(seed)
    starts = np.concatenate([[-1] * question, 3 * np.arange(first, first + size), [-1]])
    logits = generator.normal(size=(2, len(starts)))
    logits[:, :question] += 9.0  # the question is likelier than anything, and yet no answer
    return Window(*logits, starts, np.where(starts >= 0, starts + 2, -1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [1, 2, 8])
def test_the_best_span_of_all(seed: int, longest: int):
    windows = [window(0, 5, seed), window(3, 5, seed + 100)]
    spans = [
        (part.start_logits[i] + part.end_logits[j], part.char_starts[i], part.char_ends[j])
        for part in windows
        for i in range(len(part.char_starts))
        for j in range(i, min(len(part.char_starts), i + longest))
        if part.char_starts[i] >= 0 and part.char_starts[j] >= 0
    ]
    _, start, end = max(spans)
    assert best_answer(CONTEXT, windows, max_answer_length=longest) == CONTEXT[start:end]


def test_only_the_likeliest_starts_and_ends_are_combined():
    part = Window(
        np.array([1.0, 0.0, 3.0]), np.array([0.9, 0.5, 0.0]), np.array([0, 3, 6]),
        np.array([2, 5, 8]),
    )  # fmt: skip
    assert best_answer(CONTEXT, [part], n_best=1) == ""
    assert best_answer(CONTEXT, [part], n_best=3) == "ef"
    assert best_answer(CONTEXT, [part], n_best=2) == "ab"
    nothing = Window(np.zeros(2), np.zeros(2), np.array([-1, -1]), np.array([-1, -1]))
    assert best_answer(CONTEXT, [nothing]) == ""

"""Made-up questions in SQuAD's format: the answer is always "w91 w92", somewhere in the context."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.scripts import WORDS

ANSWER = ("w91", "w92")


def article(number: int, questions: int = 4, words: int = 40) -> dict[str, Any]:
    """An article with two questions on each paragraph."""
    generator = torch.Generator().manual_seed(number)
    paragraphs = []
    for first in range(0, questions, 2):
        # The last words are left out, so that the answer stands in the context once.
        drawn = torch.randint(len(WORDS) - 4, (words,), generator=generator).tolist()
        at = int(torch.randint(words, (1,), generator=generator))
        parts = [WORDS[i] for i in drawn]
        context = " ".join([*parts[:at], *ANSWER, *parts[at:]])
        answer = {"text": " ".join(ANSWER), "answer_start": context.index(ANSWER[0])}
        paragraphs.append(
            {
                "context": context,
                "qas": [
                    {
                        "id": f"{number}-{i}",
                        "question": " ".join(WORDS[number + i : number + i + 3]) + " ?",
                        "answers": [answer, {**answer, "text": ANSWER[0]}],
                    }
                    for i in range(first, min(first + 2, questions))
                ],
            }
        )
    return {"title": f"title {number}", "paragraphs": paragraphs}


def write_squad(path: Path, articles: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return path

"""Multiple-choice questions scored by the likelihood of each answer per character (acc_norm).

The files are plain JSON lines: ARC's `question`, `choices`, `answer`; PIQA's `goal`, `sol1`,
`sol2`, `label`. The prompts are those of lm-eval's `arc_easy` and `piqa`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.start_token import start_tokens
from hf_lowrank.measuring.progress import track


@dataclass(frozen=True)
class Question:
    """A text, how it may go on, and which of them is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path, limit: int) -> list[Question]:
    """The first questions of a file of ARC or PIQA.

    Raises:
        DataError: It can't be read, or a row is neither.
    """
    try:
        lines = path.read_text("utf-8").split("\n")[:limit]
        return [_question(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: holds no questions of ARC or PIQA ({error}).") from error


def _question(row: dict[str, Any]) -> Question:
    if "goal" in row:
        prompt = f"Question: {row['goal']}\nAnswer:"
        return Question(prompt, (row["sol1"], row["sol2"]), int(row["label"]))
    return Question(
        f"Question: {row['question']}\nAnswer:", tuple(row["choices"]), int(row["answer"])
    )


@torch.no_grad()
def answer_questions(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    questions: Sequence[Question],
    phase: str | None = None,
) -> list[bool]:
    """Whether the answer of the highest log likelihood per character is the right one.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; a start token goes before each prompt.
        questions: What to ask.
        phase: For the progress.
    """
    start, device = start_tokens(tokenizer), next(model.parameters()).device
    right = []
    for question in track(questions, phase, "questions"):
        prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
        scores = []
        rows = [
            tokenizer(f"{question.prompt} {choice}", add_special_tokens=False)["input_ids"]
            for choice in question.choices
        ]
        length = max(map(len, rows))
        ids = torch.tensor([start + row + [0] * (length - len(row)) for row in rows])
        logits = (
            model(input_ids=ids.to(device)).logits.float().cpu()
        )  # what is padded comes behind all that counts
        for row, choice, scored in zip(rows, question.choices, logits, strict=True):
            begin, end = len(start) + len(prompt), len(start) + len(row)
            targets = torch.tensor(row[len(prompt) :])
            loss = cross_entropy(scored[begin - 1 : end - 1], targets, reduction="sum")
            scores.append(-float(loss) / len(choice))
        right.append(max(range(len(scores)), key=scores.__getitem__) == question.answer)
    return right

"""Extractive question answering for `run_task`, on files in SQuAD's format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, set_seed

from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.inputs.sources import load_tokenizer
from hf_lowrank.tasks.models import check_max_length, new_model
from hf_lowrank.tasks.prediction import collate_inputs, predictions
from hf_lowrank.tasks.squad_data import load_squad, split_by_article, take_questions
from hf_lowrank.tasks.task import Collator, Task, digest
from hf_lowrank.tasks.task_arguments import HELD_OUT_SHARE, TaskArguments
from hf_lowrank.tasks.task_report import TaskData
from hf_lowrank.value_checks import check_between, check_count

_POSITIONS = ("start_positions", "end_positions")


@dataclass
class QaArguments(TaskArguments):
    """Arguments of a question answering run."""

    task: str = option("squad", "Name of the task in reports and files.")
    data_file: str | None = option(
        None, "Questions in SQuAD's format, version 1.1; those of the development set."
    )
    train_file: str | None = option(
        None, "Those of the training set; without it --data_file is split by article."
    )
    train_share: float = option(0.8, "Share of the questions to train on after that split.")
    questions: int = option(
        0, "Questions to use, of both sets in proportion: a seeded subset; 0 = all."
    )
    split_seed: int = option(0, "Seed of the split and the subset, whatever `seed` is.")
    max_length: int = option(384, "Tokens in a window: the question and a part of the context.")
    doc_stride: int = option(128, "Tokens of the context that neighbouring windows share.")

    def check(self) -> None:
        """Refuses what can be known to fail.

        Raises:
            ConfigError: With the first such setting.
        """
        super().check()
        if not self.data_file:
            raise ConfigError("data_file is needed: questions in SQuAD's format.")
        check_between("train_share", self.train_share, "(0, 1)")
        for name in ("questions", "doc_stride"):
            check_count(name, getattr(self, name), 0)


def load_qa_task(args: QaArguments) -> Task:
    """The questions, tokenized in windows, with the articles of about a tenth of them held out.

    A row of each split is a window: the model's inputs, `start_positions` and `end_positions`
    (the first token, where the window lacks the first gold answer), and for the scores the number
    of its `example` and the `char_starts` and `char_ends` of its tokens.

    Raises:
        ConfigError, DataError: A setting, a file or the model's tokenizer does not fit.
    """
    args.check()
    set_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    check_max_length(args)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{args.model}: question answering needs a fast tokenizer; save it as one."
        )
    questions, validation = _read(args)
    train, held_out = split_by_article(questions, 1 - HELD_OUT_SHARE, args.seed)
    parts = (train, held_out, validation)
    _check_lengths(parts, tokenizer, args)
    windows, first = [], 0
    for part in parts:
        windows.append(_windows(part, tokenizer, args, first))
        first += len(part)
    collator = partial(collate_inputs, collator=DataCollatorWithPadding(tokenizer))
    return Task(
        name=args.task,
        train=windows[0],
        held_out=windows[1],
        validation=windows[2],
        collator=collator,
        tokenizer=tokenizer,
        new_model=partial(new_model, args, AutoModelForQuestionAnswering),
        model_class=AutoModelForQuestionAnswering,
        score=partial(evaluate_qa, examples=concatenate_datasets(parts), collator=collator),
        data=TaskData(
            name=args.task,
            train_examples=len(train),
            held_out_examples=len(held_out),
            evaluation_examples=len(validation),
            files=[Path(name).name for name in (args.train_file, args.data_file) if name],
        ),
        data_key=(digest(questions), args.doc_stride),
    )


def evaluate_qa(
    model: nn.Module, split: Dataset, *, examples: Dataset, collator: Collator
) -> dict[str, float]:
    """F1 and exact match on the questions whose windows a split holds.

    Args:
        model: Gives start and end logits.
        split: Windows.
        examples: The questions; a window's `example` is a row of it.
        collator: Makes batches of windows.
    """
    from hf_lowrank.tasks.squad_metric import SquadMetric, Window, best_answer  # extra `tasks`

    windows: dict[int, list[Window]] = defaultdict(list)
    for rows, _, outputs in predictions(model, split, collator):
        starts, ends = (
            logits.float().cpu().numpy() for logits in (outputs.start_logits, outputs.end_logits)
        )
        for i, row in enumerate(rows):
            places = (np.array(row[name]) for name in ("char_starts", "char_ends"))
            size = len(row["input_ids"])
            windows[row["example"]].append(Window(starts[i, :size], ends[i, :size], *places))
    found, references = [], []
    for number in sorted(windows):
        example = examples[number]
        text = best_answer(example["context"], windows[number])
        found.append({"id": str(number), "prediction_text": text})
        references.append({"id": str(number), "answers": example["answers"]})
    scores: dict[str, float] = SquadMetric().compute(predictions=found, references=references) or {}
    return scores


def _read(args: QaArguments) -> tuple[Dataset, Dataset]:
    """The questions to train on, held-out ones included, and those of the development set."""
    data = load_squad(args.data_file or "")
    if args.train_file:
        parts = [load_squad(args.train_file), data]
    else:
        parts = list(split_by_article(data, args.train_share, args.split_seed))
    train, validation = take_questions(parts, args.questions, args.split_seed)
    if args.train_samples:
        (train,) = take_questions([train], args.train_samples, args.seed)
    return train, validation


def _check_lengths(parts: Sequence[Dataset], tokenizer: Any, args: QaArguments) -> None:  # noqa: ANN401
    texts = [text for part in parts for text in part["question"]]
    longest = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    room = args.max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= args.doc_stride:
        raise ConfigError(
            f"max_length {args.max_length} leaves {max(0, room)} tokens for the context beside the "
            f"longest question of {longest} tokens; it must leave more than doc_stride "
            f"{args.doc_stride}."
        )


def _windows(part: Dataset, tokenizer: Any, args: QaArguments, first: int) -> Dataset:  # noqa: ANN401
    """Windows of the questions, whose numbers begin with `first`."""
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(part, first):
        found = tokenizer(
            example["question"],
            example["context"],
            truncation="only_second",
            max_length=args.max_length,
            stride=args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, offsets in enumerate(found["offset_mapping"]):
            places = [
                place if sequence == 1 else (-1, -1)
                for place, sequence in zip(offsets, found.sequence_ids(i), strict=True)
            ]
            starts, ends = (list(side) for side in zip(*places, strict=True))
            row = {name: found[name][i] for name in tokenizer.model_input_names if name in found}
            row |= dict(zip(_POSITIONS, _span(starts, ends, example["answers"]), strict=True))
            rows.append(row | {"example": number, "char_starts": starts, "char_ends": ends})
    return Dataset.from_list(rows)


def _span(starts: list[int], ends: list[int], answers: dict[str, Any]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) if the window does not hold all of it."""
    text = answers["text"][0]
    begin = answers["answer_start"][0] + len(text) - len(text.lstrip())
    end = begin + len(text.strip())
    context = [i for i, start in enumerate(starts) if start >= 0]
    inside = [i for i in context if starts[i] < end and ends[i] > begin]
    if not inside or starts[context[0]] > begin or ends[context[-1]] < end:
        return 0, 0
    return inside[0], inside[-1]

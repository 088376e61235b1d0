"""Named spans in sentences, by a class for each word, for `run_task`, on files in columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    set_seed,
)

from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.inputs.sources import load_tokenizer
from hf_lowrank.measuring.items import IGNORED
from hf_lowrank.tasks.conll_data import load_conll
from hf_lowrank.tasks.models import check_max_length, new_model
from hf_lowrank.tasks.prediction import collate_inputs, predictions
from hf_lowrank.tasks.spans import span_scores, spans
from hf_lowrank.tasks.task import Collator, Task, digest, hold_out
from hf_lowrank.tasks.task_arguments import TaskArguments
from hf_lowrank.tasks.task_report import TaskData
from hf_lowrank.value_checks import check_count


@dataclass
class NerArguments(TaskArguments):
    """Arguments of a run on named spans."""

    task: str = option("ner", "Name of the task in reports and files.")
    train_file: str | None = option(
        None, "Sentences to train on: a word a line with its IOB tag, a blank line between them."
    )
    data_file: str | None = option(None, "Those of the development set.")
    word_column: int = option(1, "Column of the words, from 1; 0 = the last.")
    tag_column: int = option(0, "Column of the tags, likewise.")

    def check(self) -> None:
        """Refuses what can be known to fail.

        Raises:
            ConfigError: With the first such setting.
        """
        super().check()
        for name in ("train_file", "data_file"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is needed: words and IOB tags in columns.")
        for name in ("word_column", "tag_column"):
            check_count(name, getattr(self, name), 0)


def load_ner_task(args: NerArguments) -> Task:
    """The sentences, tokenized, with a tenth of the training set held out.

    A row of each split is a sentence: the model's inputs, `labels` with the class of a word at its
    first token and nothing at all others, and for the scores the `tags` of all words and their
    `first_tokens`, -1 for a word that was cut off.

    Raises:
        ConfigError, DataError: A setting, a file or the model's tokenizer does not fit.
    """
    args.check()
    set_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    check_max_length(args)
    if not tokenizer.is_fast:
        raise ConfigError(f"{args.model}: named spans need a fast tokenizer.")
    sentences, validation = (
        load_conll(name or "", args.word_column, args.tag_column)
        for name in (args.train_file, args.data_file)
    )
    labels = _labels(args, sentences, validation)
    train, held_out = hold_out(sentences, args)
    splits = [
        Dataset.from_list([_row(each, tokenizer, labels, args.max_length) for each in part])
        for part in (train, held_out, validation)
    ]
    # A batch of sentences whose words all were cut off, or are none to the tokenizer, has no loss.
    scored = [part.filter(lambda row: max(row["labels"]) >= 0) for part in splits[:2]]
    if not all(map(len, scored)):
        raise DataError(f"{args.train_file}: max_length {args.max_length} leaves no word to learn.")
    collator = partial(collate_inputs, collator=DataCollatorForTokenClassification(tokenizer))
    return Task(
        name=args.task,
        train=scored[0],
        held_out=scored[1],
        validation=splits[2],
        collator=collator,
        tokenizer=tokenizer,
        new_model=partial(
            new_model,
            args,
            AutoModelForTokenClassification,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        ),
        model_class=AutoModelForTokenClassification,
        score=partial(evaluate_ner, labels=labels, collator=collator),
        data=TaskData(
            name=args.task,
            train_examples=len(train),
            held_out_examples=len(held_out),
            evaluation_examples=len(validation),
            files=[Path(name or "").name for name in (args.train_file, args.data_file)],
        ),
        data_key=(digest(train), labels),
        scored="word",
    )


def evaluate_ner(
    model: nn.Module, split: Dataset, *, labels: Sequence[str], collator: Collator
) -> dict[str, float]:
    """F1 of the spans first; words that were cut off count as outside.

    Args:
        model: Gives logits of each token.
        split: Sentences.
        labels: The classes' tags.
        collator: Makes batches of sentences.
    """
    found, references = [], []
    for rows, _, outputs in predictions(model, split, collator):
        for row, best in zip(rows, outputs.logits.argmax(dim=-1).tolist(), strict=True):
            found.append([labels[best[at]] if at >= 0 else "O" for at in row["first_tokens"]])
            references.append(row["tags"])
    return span_scores(found, references)


def _labels(args: NerArguments, train: Dataset, validation: Dataset) -> list[str]:
    """The classes: outside, and begin and inside of each type of the training set."""
    known, other = (
        sorted({kind for tags in part["tags"] for _, _, kind in spans(tags)})
        for part in (train, validation)
    )
    if not known:
        raise DataError(f"{args.train_file}: all words are outside; there is no span to learn.")
    if new := [kind for kind in other if kind not in known]:
        raise DataError(
            f"{args.data_file}: has spans of type {new[0]!r}, of which {args.train_file} has none; "
            f"it has {', '.join(known)}."
        )
    return ["O", *(f"{letter}-{kind}" for kind in known for letter in "BI")]


def _row(
    sentence: dict[str, list[str]],
    tokenizer: Any,  # noqa: ANN401
    labels: Sequence[str],
    max_length: int,
) -> dict[str, Any]:
    found = tokenizer(
        " ".join(sentence["words"]),
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
    )
    places = first_tokens(sentence["words"], found["offset_mapping"])
    classes = [IGNORED] * len(found["input_ids"])
    for place, tag in zip(places, sentence["tags"], strict=True):
        if place >= 0:
            classes[place] = labels.index(tag)
    row = {name: found[name] for name in tokenizer.model_input_names if name in found}
    return row | {"labels": classes, "tags": sentence["tags"], "first_tokens": places}


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Place of the first token of each word, -1 for a word without one of its own.

    Args:
        words: Words of a text with a blank between them.
        offsets: First character of each token in it, and the one after its last; equal for
            special tokens.
    """
    found: list[int] = []
    begin = place = 0
    for word in words:
        while place < len(offsets) and offsets[place][1] <= begin:
            place += 1
        is_there = place < len(offsets) and offsets[place][0] < begin + len(word)
        found.append(place if is_there else -1)
        place += is_there
        begin += len(word) + 1
    return found

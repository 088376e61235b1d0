"""What a run has to know of a task: its examples, its model and its score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from hf_lowrank.errors import DataError
from hf_lowrank.measuring.items import Batch
from hf_lowrank.tasks.task_arguments import HELD_OUT_SHARE, TaskArguments
from hf_lowrank.tasks.task_report import TaskData

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Task:
    """A task with its examples tokenized.

    Attributes:
        name: Name of the task, as in the reports.
        train: The training examples, without the held-out ones.
        held_out: Training examples on which tolerances are tested and the best epoch is chosen.
        validation: The development set; only final figures are taken from it.
        collator: Pads a batch to its longest example.
        tokenizer: Saved along with a model.
        new_model: The model before any fine-tuning, with a fresh head.
        model_class: Its auto class, which loads a fine-tuned copy.
        score: Metrics of a model on examples of the task; the first one is the main one.
        data: What the report says of the examples.
        data_key: What a dense model depends on besides the name and the arguments that all tasks
            share: anything that JSON can hold.
        scored: What the loss is a mean over, in the singular.
    """

    name: str
    train: Dataset
    held_out: Dataset
    validation: Dataset
    collator: Collator
    tokenizer: Any
    new_model: Callable[[], nn.Module]
    model_class: Any
    score: Callable[[nn.Module, Dataset], dict[str, float]]
    data: TaskData = field(default_factory=TaskData)
    data_key: tuple[object, ...] = ()
    scored: str = "example"

    def batches(self, split: Dataset, size: int, limit: int | None = None) -> Sequence[Batch]:
        """Padded batches of the first examples of a split, all of them without a limit."""
        rows = [split[i] for i in range(min(limit or len(split), len(split)))]
        return [dict(self.collator(rows[i : i + size])) for i in range(0, len(rows), size)]


def hold_out(train: Dataset, args: TaskArguments) -> tuple[Dataset, Dataset]:
    """A training set, shuffled and cut to `train_samples`, in two: to train on, and held out.

    Raises:
        DataError: It is too small.
    """
    train = train.shuffle(seed=args.seed)
    if args.train_samples:
        train = train.select(range(min(args.train_samples, len(train))))
    if len(train) < 2:
        raise DataError(f"{args.task}: {len(train)} training example is too few; 2 are needed.")
    count = max(1, int(HELD_OUT_SHARE * len(train)))
    return train.select(range(count, len(train))), train.select(range(count))


def digest(data: Dataset) -> str:
    """What tells a data set from others, for `Task.data_key`."""
    return hashlib.blake2b(json.dumps(data.to_list()).encode(), digest_size=8).hexdigest()

"""GLUE tasks for `run_task`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    set_seed,
)

from hf_lowrank.config import option
from hf_lowrank.inputs.sources import load_tokenizer
from hf_lowrank.tasks.glue_data import HUB_DATASET, TASKS, hub_split, load_glue
from hf_lowrank.tasks.models import new_model
from hf_lowrank.tasks.prediction import predictions
from hf_lowrank.tasks.task import Collator, Task, hold_out
from hf_lowrank.tasks.task_arguments import TaskArguments
from hf_lowrank.tasks.task_report import TaskData
from hf_lowrank.value_checks import check_choice


@dataclass
class GlueArguments(TaskArguments):
    """Arguments of a GLUE run."""

    task: str = option("mrpc", "Task: " + ", ".join(TASKS) + ".")
    data_dir: str | None = option(None, "Folder with the original files; default: the Hub.")

    def check(self) -> None:
        """Refuses what can be known to fail.

        Raises:
            ConfigError, DataError: With the first such setting.
        """
        super().check()
        check_choice("task", self.task, TASKS)


def load_glue_task(args: GlueArguments) -> Task:
    """The task's data, tokenized, with a tenth of the training set held out.

    Raises:
        ConfigError, DataError: A setting, a file or the model's tokenizer does not fit.
    """
    args.check()
    set_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    train, held_out = hold_out(load_glue(args.task, "train", args.data_dir), args)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        pair = (row["sentence1"], row.get("sentence2"))
        found = dict(tokenizer(*pair, truncation=True, max_length=args.max_length))
        return found | {"labels": row["label"]}

    def prepare(split: Dataset) -> Dataset:
        return split.map(tokenize, remove_columns=split.column_names)

    collator = DataCollatorWithPadding(tokenizer)
    validation = load_glue(args.task, "validation", args.data_dir)
    return Task(
        name=args.task,
        train=prepare(train),
        held_out=prepare(held_out),
        validation=prepare(validation),
        collator=collator,
        tokenizer=tokenizer,
        new_model=partial(
            new_model,
            args,
            AutoModelForSequenceClassification,
            num_labels=TASKS[args.task].num_labels,
        ),
        model_class=AutoModelForSequenceClassification,
        score=partial(evaluate_glue, task=args.task, collator=collator),
        data=TaskData(
            name=f"GLUE {args.task}",
            dataset=HUB_DATASET,
            config=args.task,
            split=hub_split(args.task, "validation"),
            train_examples=len(train),
            held_out_examples=len(held_out),
            evaluation_examples=len(validation),
        ),
    )


def evaluate_glue(
    model: nn.Module, split: Dataset, *, task: str, collator: Collator
) -> dict[str, float]:
    """The task's metrics on tokenized examples, the main one first."""
    from hf_lowrank.tasks.glue_metric import MAIN_METRIC, GlueMetric  # the extra `tasks`

    found: list[float] = []
    references: list[float] = []
    for _, batch, outputs in predictions(model, split, collator):
        logits = outputs.logits
        single = logits.shape[-1] == 1
        found += (logits.squeeze(-1) if single else logits.argmax(-1)).tolist()
        references += batch["labels"].tolist()
    metric = GlueMetric(config_name=task)
    scores = metric.compute(predictions=found, references=references) or {}
    main = MAIN_METRIC[task]
    return {main: scores[main]} | scores

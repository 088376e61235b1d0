"""`TaskReport`: the report of a run on a task, which adds the task's scores to `Report`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hf_lowrank.pruning.lpaf_report import LpafReport
from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Data
from hf_lowrank.report.training_sections import RankSelection
from hf_lowrank.training.switch import Switch


@dataclass(frozen=True)
class TaskData(Data):
    """The examples of a task.

    Attributes:
        name: Name of the task for readers.
        dataset: Hub id of its data set, or None; as the next two.
        config: Its configuration.
        split: The split that is the development set.
        train_examples: Examples that were trained on.
        held_out_examples: Training examples on which choices were made.
        evaluation_examples: Examples of the development set, for final figures alone.
        files: Names of the files that were read, where it was files.
    """

    name: str = ""
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    train_examples: int = 0
    held_out_examples: int = 0
    evaluation_examples: int = 0
    files: list[str] | None = None


@dataclass(frozen=True)
class DevelopmentLoss:
    """Mean losses on the development set in the stored type, nats.

    Attributes:
        dense: Of the dense model.
        compressed: Of the model that the run made.
        difference: Their paired difference.
        standard_error: Its standard error over examples.
        per: What they are means over, None in older reports: an example.
    """

    dense: float
    compressed: float
    difference: float
    standard_error: float
    per: str | None = None


@dataclass
class TaskReport(Report):
    """Result of one run on a task. Scores are shares of 1, the task's main metric first.

    Attributes:
        task: Name of the task.
        method: How the model was compressed, see `TaskArguments`.
        arguments: All arguments of the run.
        dense_metrics: Scores of the dense fine-tuned model on the development set.
        pruned_metrics: The same of LPAF's pruned model, before it is factorized.
        uncured_metrics: The same of the compressed model before its fine-tuning, where there is
            such a moment.
        metrics: The same of the model that the run made.
        dense_held_out_metrics: Scores on the held-out part of the training set.
        pruned_held_out_metrics: The same of LPAF's pruned model.
        uncured_held_out_metrics: The same of the compressed model before its fine-tuning.
        held_out_metrics: The same of the model that the run made.
        held_out_loss: Its mean loss there, nats per example.
        development_loss: Loss on the development set, None in older reports.
        selections: What each rank selection did, where ranks are selected in training.
        switch: When full-rank training gave way to factors; for Cuttlefish alone.
        lpaf: What LPAF's stages did.
        refusal: Why the model was left pruned and dense; then `metrics` are the pruned model's.
        date: Day of the run.
    """

    LOSS_UNIT: ClassVar[str] = "nats"

    data: TaskData = field(default_factory=TaskData)
    task: str = ""
    method: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    dense_metrics: dict[str, float] = field(default_factory=dict)
    pruned_metrics: dict[str, float] | None = None
    uncured_metrics: dict[str, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    dense_held_out_metrics: dict[str, float] = field(default_factory=dict)
    pruned_held_out_metrics: dict[str, float] | None = None
    uncured_held_out_metrics: dict[str, float] | None = None
    held_out_metrics: dict[str, float] = field(default_factory=dict)
    held_out_loss: float | None = None
    development_loss: DevelopmentLoss | None = None
    selections: list[RankSelection] | None = None
    switch: Switch | None = None
    lpaf: LpafReport | None = None
    refusal: str | None = None
    date: str = ""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data without the fields that the method or the run has nothing for."""
        return {name: value for name, value in super().to_dict().items() if value not in _NOTHING}


_NOTHING: tuple[Any, ...] = (None, "", [], {})


def main_score(scores: Mapping[str, float]) -> float:
    """The task's main metric, which comes first."""
    return next(iter(scores.values()))


def load_report(path: Path) -> Report:
    """Reads a report of either kind.

    Raises:
        DataError: There is no such file, or it is no report.
    """
    found = TaskReport.load(path)
    return found if found.task else Report.load(path)

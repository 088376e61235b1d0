"""`TaskReport`: the report of a run on a task, which adds the task's scores to `Report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowrank.report.schema import Report


@dataclass
class TaskReport(Report):
    """Result of one run on a task. Scores are shares of 1, the task's main metric first.

    `data` says which: `name` and, if it is on the Hub, `dataset`, `config` and `split` of the
    development set; `train_examples`, `held_out_examples` and `evaluation_examples`.

    Attributes:
        task: Name of the task.
        method: How the model was compressed, see `TaskArguments`.
        arguments: All arguments of the run.
        dense_metrics: Scores of the dense fine-tuned model on the development set.
        uncured_metrics: The same of the compressed model before its fine-tuning, where there is
            such a moment.
        metrics: The same of the model that the run made.
        dense_held_out_metrics: Scores on the held-out part of the training set.
        uncured_held_out_metrics: The same of the compressed model before its fine-tuning.
        held_out_metrics: The same of the model that the run made.
        held_out_loss: Its mean loss there, nats per example.
        development_loss: Mean loss on the development set in the stored type, nats per example:
            `dense`, `compressed` (the model that the run made), their paired `difference` and its
            `standard_error`.
        selections: What each rank selection did, where ranks are selected in training.
        switch: When full-rank training gave way to factors, see `FullRankSwitch.summary`; for
            Cuttlefish alone.
        lpaf: What LPAF's stages did.
        command: Command line of the run; this and the next three are of saved runs only.
        commit: Version of the code.
        date: Day of the run.
        hardware: What it ran on.
    """

    task: str = ""
    method: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    dense_metrics: dict[str, float] = field(default_factory=dict)
    uncured_metrics: dict[str, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    dense_held_out_metrics: dict[str, float] = field(default_factory=dict)
    uncured_held_out_metrics: dict[str, float] | None = None
    held_out_metrics: dict[str, float] = field(default_factory=dict)
    held_out_loss: float | None = None
    development_loss: dict[str, float] = field(default_factory=dict)
    selections: list[dict[str, Any]] | None = None
    switch: dict[str, Any] | None = None
    lpaf: dict[str, Any] | None = None
    command: str = ""
    commit: str = ""
    date: str = ""
    hardware: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data without the fields that the method or the run has nothing for."""
        return {name: value for name, value in super().to_dict().items() if value not in _NOTHING}


_NOTHING: tuple[Any, ...] = (None, "", [], {})


def load_report(path: Path) -> Report:
    """Reads a report of either kind.

    Raises:
        DataError: There is no such file, or it is no report.
    """
    found = TaskReport.load(path)
    return found if found.task else Report.load(path)

"""GLUE's metrics as an `evaluate.Metric` that needs no hub."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

MAIN_METRIC = {
    "cola": "matthews_correlation",
    "stsb": "pearson",
} | dict.fromkeys(("sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli"), "accuracy")


class GlueMetric(evaluate.Metric):
    """Accuracy, F1, Matthews correlation, or Pearson and Spearman correlation, by task.

    Args:
        config_name: Task name as in `hf_lowrank.tasks.glue_data.TASKS`.
        **kwargs: As for `evaluate.Metric`.
    """

    def _info(self) -> evaluate.MetricInfo:
        value = "float32" if self.config_name == "stsb" else "int64"
        return evaluate.MetricInfo(
            description="GLUE metrics, computed locally",
            citation="Wang et al., GLUE, ICLR 2019",
            features=datasets.Features(
                {"predictions": datasets.Value(value), "references": datasets.Value(value)}
            ),
        )

    def _compute(
        self,
        *,
        predictions: Any = None,  # noqa: ANN401
        references: Any = None,  # noqa: ANN401
        **kwargs: Any,
    ) -> dict[str, float]:
        return glue_scores(self.config_name, np.asarray(predictions), np.asarray(references))


def glue_scores(task: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The task's metrics.

    Args:
        task: Task name.
        predictions: Class ids, or scores for STS-B, shape (examples,).
        references: The same for the gold labels.
    """
    if task == "cola":
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
    if task == "stsb":
        return {
            "pearson": _correlation(pearsonr, predictions, references),
            "spearmanr": _correlation(spearmanr, predictions, references),
        }
    scores = {"accuracy": float(np.mean(predictions == references))}
    if task in ("mrpc", "qqp"):
        scores["f1"] = float(f1_score(references, predictions, zero_division=0))
    return scores


def _correlation(function: Any, predictions: np.ndarray, references: np.ndarray) -> float:  # noqa: ANN401
    """0 for constant predictions, which have no correlation."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(function(predictions, references)[0])

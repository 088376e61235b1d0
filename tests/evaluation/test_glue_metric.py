"""GLUE's metrics against scikit-learn's and scipy's, and against figures by hand."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hf_lowrank.tasks.glue_data import TASKS
from hf_lowrank.tasks.glue_metric import MAIN_METRIC, GlueMetric, glue_scores

PREDICTIONS = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1])
REFERENCES = np.array([1, 0, 0, 1, 1, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("task", [task for task in TASKS if task != "stsb"])
def test_class_metrics_are_sklearns(task: str):
    expected = {
        "accuracy": accuracy_score(REFERENCES, PREDICTIONS),
        "f1": f1_score(REFERENCES, PREDICTIONS),
        "matthews_correlation": matthews_corrcoef(REFERENCES, PREDICTIONS),
    }
    found = GlueMetric(config_name=task).compute(predictions=PREDICTIONS, references=REFERENCES)
    names = {"cola": {"matthews_correlation"}, "mrpc": {"accuracy", "f1"}}
    names["qqp"] = names["mrpc"]
    assert set(found) == names.get(task, {"accuracy"})
    assert found == pytest.approx({name: expected[name] for name in found})
    assert MAIN_METRIC[task] in found


def test_figures_by_hand():
    """4 hits of 6 positives among 6 predicted, 6 of 10 right."""
    found = glue_scores("mrpc", PREDICTIONS, REFERENCES)
    assert found == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    # (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)) = (8 - 4) / 24
    assert glue_scores("cola", PREDICTIONS, REFERENCES) == pytest.approx(
        {"matthews_correlation": 1 / 6}
    )


def test_correlations_are_scipys():
    generator = np.random.default_rng(0)
    references = generator.uniform(0, 5, 40)
    predictions = references**2 + generator.normal(0, 2, 40)
    found = GlueMetric(config_name="stsb").compute(predictions=predictions, references=references)
    assert found["pearson"] == pytest.approx(pearsonr(predictions, references)[0], abs=1e-6)
    assert found["spearmanr"] == pytest.approx(spearmanr(predictions, references)[0], abs=1e-6)
    assert found["pearson"] != pytest.approx(found["spearmanr"], abs=1e-3)
    assert MAIN_METRIC["stsb"] == "pearson"


@pytest.mark.parametrize("task", TASKS)
def test_constant_predictions_have_a_score_and_no_warning(task: str):
    references = np.array([0, 1, 1, 0, 1])
    for value in (0, 1):
        found = glue_scores(task, np.full(5, value), references)
        assert all(np.isfinite(score) for score in found.values())
        if task in ("cola", "stsb"):
            assert set(found.values()) == {0.0}
        else:
            assert found["accuracy"] == pytest.approx(0.6 if value else 0.4)
            assert found.get("f1", 0.75 if value else 0.0) == pytest.approx(0.75 if value else 0.0)


def test_constant_references_have_no_correlation():
    found = glue_scores("stsb", np.array([1.0, 2.0, 3.0]), np.full(3, 2.5))
    assert found == {"pearson": 0.0, "spearmanr": 0.0}


def test_every_task_has_a_main_metric():
    assert set(MAIN_METRIC) == set(TASKS)

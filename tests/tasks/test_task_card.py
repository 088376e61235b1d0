"""The card of a task's model: its scores and steps, and no figure that is not in the report."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_lowrank.pruning.lpaf_report import LpafReport, Overheads
from hf_lowrank.pruning.pruned_ranks import NumericalRanks
from hf_lowrank.report.card.card import TAGS, model_card
from hf_lowrank.report.card.card_parts import layers_note
from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Settings
from hf_lowrank.report.training_sections import Training
from hf_lowrank.tasks.task_report import TaskData, TaskReport, load_report
from tests.report.test_report import report as text_report

EXAMPLES = {"train_examples": 3302, "held_out_examples": 366, "evaluation_examples": 408}
GLUE = {"name": "GLUE mrpc", "dataset": "nyu-mll/glue", "config": "mrpc", "split": "validation"}
ARGUMENTS = {
    "dense_epochs": 3,
    "dense_learning_rate": 1e-4,
    "epochs": 1,
    "learning_rate": 2e-5,
    "batch_size": 32,
    "calibration_samples": 1536,
    "final_density": 0.25,
}


def report(**changes: Any) -> TaskReport:
    values = vars(text_report()) | {
        "evaluation": None,
        "model": "/home/ada/encoder",
        "base_model": "acme/encoder",
        "architecture": "BertForSequenceClassification",
        "task": "mrpc",
        "method": "kfac",
        "arguments": ARGUMENTS,
        "data": TaskData(**GLUE, **EXAMPLES),
        "dense_metrics": {"accuracy": 0.7868, "f1": 0.8528},
        "uncured_metrics": {"accuracy": 0.7745, "f1": 0.8411},
        "metrics": {"accuracy": 0.7966, "f1": 0.85205},
    }
    return TaskReport(**(values | changes))


def test_metadata_of_a_glue_model():
    found = ModelCard(str(model_card(report(), "ada/small"))).data.to_dict()
    assert (found["base_model"], found["library_name"]) == ("acme/encoder", "transformers")
    assert found["pipeline_tag"] == "text-classification"
    assert (found["datasets"], found["tags"]) == (["nyu-mll/glue"], TAGS)
    assert found["metrics"] == ["accuracy", "f1"]
    (entry,) = found["model-index"]
    assert entry["name"] == "encoder on GLUE mrpc, low-rank, 75.0% of the parameters"
    (result,) = entry["results"]
    assert result["dataset"] == {
        "name": "GLUE mrpc",
        "type": "nyu-mll/glue",
        "config": "mrpc",
        "split": "validation",
    }
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {"accuracy": 0.7966, "f1": 0.852}


def test_a_data_set_that_is_not_on_the_hub():
    changes = {"task": "squad", "data": TaskData(name="squad", **EXAMPLES)}
    card = model_card(report(**changes, architecture="BertForQuestionAnswering"), "small")
    found = card.data.to_dict()
    assert "datasets" not in found
    assert found["pipeline_tag"] == "question-answering"
    assert found["model-index"][0]["results"][0]["dataset"] == {"name": "squad", "type": "squad"}


def test_scores_steps_and_examples_are_told():
    text = str(model_card(report(), "ada/small"))
    assert "| accuracy | 0.7868 | 0.7966 |  |" in text
    assert "| in the encoder's linear layers | 500,000 | 250,000 | 50.0% |" in text
    assert "fine-tuned on 3,302 examples for 3 epochs (learning rate 0.0001), in batches" in text
    assert "Ranks by metric kfac; seed 3. Calibration: 1,536 of these examples." in text
    assert "Then fine-tuned for 1 epoch (learning rate 2e-05); of the start" in text
    assert "Choices: on 366 examples held out of the training set." in text
    assert "the 408 examples of the development set of GLUE mrpc" in text
    assert "Before the last fine-tuning: accuracy 0.7745, f1 0.8411." in text
    assert "The run had 1 epoch of training more than the dense model" in text
    assert "per token" not in text
    assert "/home" not in text


def test_a_tolerance_is_not_per_token():
    config = Settings(metric="kfac", loss_tolerance=0.05)
    text = model_card(report(config=config), "small").text
    assert "Goal: the smallest model within 0.05 nats of the dense one." in text


LPAF = LpafReport({}, 0.25, NumericalRanks(0.25, 8.0, 8.0, 8.0, 4.0, {}), Overheads(None), {})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arguments": ARGUMENTS | {"epochs": 0}}, "Not trained after it."),
        (
            {"lpaf": LPAF, "config": Settings(metric="sparsity", param_ratio=0.5)},
            "Then 1 epoch (learning rate 2e-05) of LPAF: weights pruned to a density of 0.25, cut,",
        ),
        (
            {"arguments": ARGUMENTS | {"steps": 2400, "distillation_weight": 0.5}},
            "Then fine-tuned for 2400 steps (learning rate 2e-05); of the start and the epochs, "
            "the one with the lowest held-out loss was kept.\nThe dense model's predictions were "
            "50% of the loss in what came after it.",
        ),
        (
            {
                "training": Training(
                    epochs=2,
                    learning_rate=1e-4,
                    rule="price",
                    selections=1,
                    param_ratio=None,
                    tolerance=0.02,
                )
            },
            "with 1 selection of ranks by rule price, each raising the loss by at most 0.02 nats",
        ),
    ],
)
def test_how_other_methods_made_it(changes: dict[str, Any], expected: str):
    assert expected in model_card(report(**changes), "small").text


def test_a_dense_model_is_not_called_low_rank():
    dense = report(method="dense", ranks={"a.up": None}, arguments=ARGUMENTS | {"epochs": 0})
    card = model_card(dense, "small")
    assert card.data.tags == ["hf-lowrank"]
    assert "encoder on GLUE mrpc, dense" in card.text
    assert "thin matrices" not in card.text
    assert "import hf_lowrank" not in card.text
    assert "trust_remote_code" not in card.text
    assert 'AutoModelForSequenceClassification.from_pretrained("small")' in card.text


KEPT = sorted(
    path
    for folder in ("model_cards", "docs/results")
    for path in (Path(__file__).resolve().parents[2] / folder).rglob("*.json")
    if isinstance((data := json.loads(path.read_text("utf-8"))).get("parameters"), dict)
    and {"model", "dense", "bytes"} <= {*data, *data["parameters"]}
)


def test_reports_of_earlier_versions_are_read_and_nothing_of_them_changes():
    assert len(KEPT) > 60
    for path in KEPT:
        found, old = load_report(path).to_dict(), json.loads(path.read_text("utf-8"))
        for name in set(old) & set(found):
            assert json.loads(json.dumps(found[name])) == filled(old[name], found[name]), (
                path,
                name,
            )


def filled(old: Any, new: Any) -> Any:
    """The old value with what a later version adds to it, such as the accelerator's name."""
    if isinstance(old, dict):
        return {key: None for key in new if key not in old} | {
            key: filled(value, new.get(key)) for key, value in old.items()
        }
    if isinstance(old, list) and isinstance(new, list):
        return [filled(*pair) for pair in zip(old, new, strict=True)]
    return old


def test_reports_of_both_kinds_come_back_as_what_they_were(tmp_path: Path):
    for number, kept in enumerate((report(), text_report())):
        path = tmp_path / f"{number}.json"
        kept.save(path)
        found = load_report(path)
        assert type(found) is type(kept)
        assert found == kept
        assert type(Report.load(path)) is Report
    saved = json.loads((tmp_path / "0.json").read_text())
    assert "selections" not in saved
    assert "evaluation" not in saved


@pytest.mark.parametrize(
    ("form", "ranks", "said"),
    [
        (
            "compact",
            {"a.up": 3},
            "its linear layers are of low rank, in a compact form, with a rank",
        ),
        (
            "factors",
            {"a.up": 3},
            "its linear layers are products of two thin matrices, with a rank",
        ),
        (None, {"a.up": 3}, "its linear layers are products of two thin matrices, with"),
        ("compact", {"a.up": None}, "every layer is an ordinary one, some of them smaller."),
    ],
)
def test_what_the_layers_are_depends_on_their_form(form: Any, ranks: Any, said: str):
    others = {} if form is None else {"form": form}
    text = layers_note(report(ranks=ranks, config=Settings(others=others)), "its effect")
    assert text.startswith(said)

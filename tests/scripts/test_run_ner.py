"""`scripts/run_ner.py` end to end: a tiny encoder, made-up sentences with spans."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

import hf_lowrank
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.tasks.ner import NerArguments, load_ner_task
from hf_lowrank.tasks.task import Task
from tests.conll import write_conll
from tests.scripts import Finished, InProcess, as_arguments, leftovers, save_encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, the data, and room for the dense model that runs share."""
    folder = tmp_path_factory.mktemp("ner")
    save_encoder(folder / "model")
    write_conll(folder / "train.txt", 40)
    write_conll(folder / "dev.txt", 12, seed=1)
    return folder


def settings(place: Path, **changes: object) -> dict[str, Any]:
    return {
        "model": str(place / "model"),
        "train_file": str(place / "train.txt"),
        "data_file": str(place / "dev.txt"),
        "cache_dir": str(place / "cache"),
        "dense_epochs": 8,
        "dense_learning_rate": 3e-3,
        "epochs": 1,
        "batch_size": 8,
        "max_length": 32,
        "bf16": False,
        **changes,
    }


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    script = InProcess("run_ner", monkeypatch, capsys)

    def start(**changes: object) -> Finished:
        return script(*as_arguments(settings(place, **changes)))

    return start


def load(place: Path, **changes: object) -> Task:
    return load_ner_task(NerArguments(**settings(place, **changes)))


def test_rows_have_a_class_at_the_first_token_of_each_word(place: Path):
    task = load(place)
    labels = task.new_model().config.id2label
    assert list(labels.values()) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    tokens = AutoTokenizer.from_pretrained(place / "model")
    assert (len(task.train), len(task.held_out), len(task.validation)) == (36, 4, 12)
    for row in task.train:
        words = tokens.convert_ids_to_tokens(row["input_ids"])
        assert row["labels"][0] == row["labels"][-1] == -100
        found = [labels[label] for label in row["labels"][1:-1]]
        assert found == row["tags"]
        wanted = {"w80": "B-PER", "w81": "I-PER", "w82": "B-LOC"}
        assert found == [wanted.get(word, "O") for word in words[1:-1]]


def test_words_that_are_cut_off_are_scored_as_outside(place: Path):
    whole, short = load(place), load(place, max_length=6)
    assert all(len(row["labels"]) <= 6 for row in short.validation)
    assert whole.validation["tags"] == short.validation["tags"]
    labels = list(whole.new_model().config.id2label.values())

    class Oracle(torch.nn.Module):
        """Knows the spans' words."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
            scores = torch.zeros(*input_ids.shape, len(labels))
            scores[..., 0] = 1
            tokens = AutoTokenizer.from_pretrained(place / "model")
            for word, tag in (("w80", "B-PER"), ("w81", "I-PER"), ("w82", "B-LOC")):
                at = input_ids == tokens.convert_tokens_to_ids(word)
                scores[..., labels.index(tag)] = 2.0 * at
            return type("Output", (), {"logits": scores})

    assert whole.score(Oracle(), whole.validation)["f1"] == 1.0
    found = short.score(Oracle(), short.validation)
    assert 0 < found["recall"] < found["precision"] <= 1


@pytest.mark.parametrize(
    ("method", "goal"),
    [
        ("dense", {"epochs": 0}),
        ("kfac", {"param_ratio": 0.5}),
        ("rank-selection-price", {"param_ratio": 0.5}),
        ("lpaf", {"param_ratio": 0.5, "gate": 0.0, "distillation_weight": 0.5}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_every_kind_of_method_reports_and_saves(
    run: Any, method: str, goal: dict[str, Any], tmp_path: Path
):
    output = tmp_path / "output"
    done = run(method=method, output_dir=output, **goal)
    assert done.code == 0, done.err
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert (report["task"], report["method"]) == ("ner", method)
    assert list(report["metrics"]) == ["f1", "precision", "recall", "accuracy"]
    assert report["dense_metrics"]["f1"] > 0.9  # it has learned the spans' words
    assert re.search(rf"dense_metrics +{report['dense_metrics']['f1']:.4f} ", done.out)
    assert " nats per word (" in done.out
    assert report["data"]["files"] == ["train.txt", "dev.txt"]
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "token-classification"
    assert "nats per word" in card.text
    kept, dense = (report["parameters"][f"targeted_{name}"] for name in ("kept", "dense"))
    if method == "dense":
        assert kept == dense
        return
    assert 0.4 * dense < kept <= 0.5 * dense
    model = hf_lowrank.load(output)
    assert type(model).__name__ == "BertForTokenClassification"
    assert model.config.id2label[3] == "B-PER"
    assert factorized_layers(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_file": None}, "data_file is needed: words and IOB tags in columns."),
        ({"train_file": None}, "train_file is needed: words and IOB tags in columns."),
        ({"train_file": "nowhere.txt"}, "nowhere.txt: can't be read"),
        ({"tag_column": -1}, "tag_column must be an integer >= 0, got -1."),
        ({"tag_column": 2}, "train.txt: line 3 has the tag 'NN'; expected O"),
        ({"max_length": 100}, "max_length 100 exceeds the 64 positions of"),
    ],
    ids=str,
)
def test_a_mistake_ends_with_one_line(
    run: Any, changes: dict[str, Any], message: str, tmp_path: Path
):
    done = run(output_dir=tmp_path / "output", param_ratio=0.5, **changes)
    assert message in done.error
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data_file", "a B-ORG\n", "has spans of type 'ORG', of which"),
        ("train_file", "a O\n\nb O\n", "all words are outside; there is no span to learn."),
        ("train_file", "a B-PER\nb B-LOC\n", "ner: 1 training example is too few; 2 are needed."),
    ],
    ids=str,
)
def test_files_that_do_not_fit_each_other(
    run: Any, name: str, text: str, message: str, tmp_path: Path
):
    (tmp_path / "odd.txt").write_text(text)
    done = run(param_ratio=0.5, **{name: tmp_path / "odd.txt"})
    assert message in done.error

"""`scripts/run_qa.py` end to end and its windows: a tiny encoder, made-up articles."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowrank
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.tasks.fine_tuning import dense_model
from hf_lowrank.tasks.qa import QaArguments, load_qa_task
from hf_lowrank.tasks.task import Task
from tests.scripts import Finished, InProcess, leftovers, pair_tokenizer, save_encoder
from tests.squad import ANSWER, article, write_squad


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, the data, and room for the dense models that runs share."""
    folder = tmp_path_factory.mktemp("qa")
    save_encoder(folder / "model")
    write_squad(folder / "squad.json", [article(i) for i in range(12)])
    return folder


def settings(place: Path, **changes: object) -> dict[str, Any]:
    return {
        "model": str(place / "model"),
        "data_file": str(place / "squad.json"),
        "cache_dir": str(place / "cache"),
        "dense_epochs": 6,
        "dense_learning_rate": 3e-3,
        "epochs": 1,
        "batch_size": 8,
        "max_length": 32,
        "doc_stride": 8,
        "bf16": False,
        **changes,
    }


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    script = InProcess("run_qa", monkeypatch, capsys)

    def start(**changes: object) -> Finished:
        given = settings(place, **changes)
        return script(*(part for n, v in given.items() if v is not None for part in (f"--{n}", v)))

    return start


def load(place: Path, **changes: object) -> Task:
    return load_qa_task(QaArguments(**settings(place, **changes)))


class Oracle(nn.Module):
    """Finds the words of the answer; beside them it likes the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.ids = pair_tokenizer().convert_tokens_to_ids(list(ANSWER))

    def forward(self, input_ids: torch.Tensor, attention_mask: Any, token_type_ids: Any) -> Any:
        start, end = (10.0 * (input_ids == token) + self.bias for token in self.ids)
        start[:, 0] = end[:, 0] = 50.0
        return SimpleNamespace(start_logits=start, end_logits=end)


def test_windows_hold_the_answer_where_the_positions_say(place: Path):
    task = load(place)
    answerless, examples = 0, set()
    for row in task.train:
        words = pair_tokenizer().convert_ids_to_tokens(row["input_ids"])
        start, end = row["start_positions"], row["end_positions"]
        assert len(words) <= 32
        assert words[0] == "<s>"
        if start == 0:
            assert end == 0
            assert not set(ANSWER) <= set(words)
            answerless += 1
        else:
            assert tuple(words[start : end + 1]) == ANSWER
        examples.add(row["example"])
        inside = [i for i, char in enumerate(row["char_starts"]) if char >= 0]
        assert inside == list(range(words.index("</s>") + 1, len(words) - 1))
    assert answerless > 0
    assert len(task.train) > len(examples)


def test_parts_share_no_context(place: Path):
    task = load(place)
    examples = [set(part["example"]) for part in (task.train, task.held_out, task.validation)]
    assert sum(map(len, examples)) == 48
    assert not examples[0] & examples[1] | examples[1] & examples[2] | examples[0] & examples[2]
    assert len(examples[2]) in (8, 12)  # of 12 articles with 4 questions each, a fifth
    assert len(examples[1]) == 4
    other = load(place, seed=1)
    assert (
        other.validation.to_list() == task.validation.to_list()
        or set(other.validation["example"]) == examples[2]
    )


def test_an_oracle_has_full_marks_and_a_constant_has_not(place: Path):
    """Answers are found over overlapping windows, whatever the logits of the first token."""
    task = load(place)
    model = Oracle().train()
    assert task.score(model, task.validation) == {"f1": 1.0, "exact_match": 1.0}
    assert task.score(model, task.held_out) == {"f1": 1.0, "exact_match": 1.0}
    assert model.training
    model.ids = [5, 5]
    found = task.score(model, task.validation)
    assert list(found) == ["f1", "exact_match"]
    assert found["f1"] < 0.3


def test_batches_hold_only_what_the_model_takes(place: Path):
    task = load(place)
    (batch, *_) = task.batches(task.train, 8)
    positions = {"start_positions", "end_positions"}
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"} | positions
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_the_dense_model_of_other_questions_is_another(place: Path, tmp_path: Path):
    for changes in ({}, {"questions": 24}, {"doc_stride": 4}, {"split_seed": 3}, {}):
        args = QaArguments(**settings(place, cache_dir=str(tmp_path), dense_epochs=0, **changes))
        dense_model(load_qa_task(args), args)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_training_file_of_its_own(place: Path, tmp_path: Path):
    train = write_squad(tmp_path / "train.json", [article(i) for i in range(20, 24)])
    task = load(place, train_file=str(train), questions=32)
    counts = [len(set(part["example"])) for part in (task.train, task.held_out, task.validation)]
    assert counts[0] + counts[1] == 8
    assert counts[2] == 24


@pytest.mark.parametrize(
    ("method", "goal"),
    [
        ("dense", {"epochs": 0}),
        ("kfac", {"param_ratio": 0.5}),
        ("rank-selection", {"param_ratio": 0.5}),
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
    assert f"saved to {output}\n" in done.out
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert (report["task"], report["method"]) == ("squad", method)
    assert list(report["metrics"]) == ["f1", "exact_match"]
    assert report["dense_metrics"]["f1"] > 0.9  # it has learned the answer's words
    assert re.search(rf"dense_metrics +{report['dense_metrics']['f1']:.4f} ", done.out)
    kept, dense = (report["parameters"][f"targeted_{name}"] for name in ("kept", "dense"))
    if method == "dense":
        assert kept == dense
        return
    assert 0.4 * dense < kept <= 0.5 * dense
    model = hf_lowrank.load(output)
    assert type(model).__name__ == "BertForQuestionAnswering"
    assert factorized_layers(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_file": None}, "data_file is needed"),
        ({"data_file": "nowhere.json"}, "nowhere.json: can't be read as JSON"),
        ({"train_share": 1.0}, "train_share must lie in (0, 1), got 1.0."),
        ({"questions": -1}, "questions must be an integer >= 0, got -1."),
        ({"max_length": 14}, "max_length 14 leaves 7 tokens for the context beside the longest"),
        ({"max_length": 100}, "max_length 100 exceeds the 64 positions of"),
        ({"param_ratio": 1.5}, "param_ratio"),
    ],
    ids=str,
)
def test_a_mistake_ends_with_one_line(
    run: Any, changes: dict[str, Any], message: str, tmp_path: Path
):
    done = run(output_dir=tmp_path / "output", **changes)
    assert message in done.error
    assert leftovers(tmp_path) == []

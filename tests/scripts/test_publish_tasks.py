"""`--push_to_hub` of run_glue.py, run_qa.py and train_llm.py, against the fake Hub."""

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import hf_lowrank
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.report.schema import Report
from hf_lowrank.tasks import fine_tuning
from hf_lowrank.tasks.task_report import TaskReport, load_report
from tests.fake_hub import FakeHub, acting_as_the_hub, published
from tests.scripts import Finished, InProcess, Inputs, save_encoder
from tests.scripts.test_run_glue import pairs
from tests.squad import article, write_squad

SHARED = {
    "base_model": "acme/encoder",
    "method": "kfac",
    "param_ratio": 0.5,
    "dense_epochs": 0,
    "epochs": 0,
    "max_length": 32,
    "bf16": False,
}
Run = Callable[..., Finished]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data for all three scripts."""
    folder = tmp_path_factory.mktemp("publish")
    save_encoder(folder / "model")
    (folder / "train.tsv").write_text(pairs(24, 0))
    (folder / "dev.tsv").write_text(pairs(12, 1))
    write_squad(folder / "squad.json", [article(i) for i in range(6)])
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with acting_as_the_hub(monkeypatch, tmp_path) as fake:
        yield fake


@pytest.fixture
def run(
    hub: FakeHub, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    settings = {
        "run_glue": {"task": "mrpc", "data_dir": place, **SHARED},
        "run_qa": {"data_file": place / "squad.json", "doc_stride": 8, **SHARED},
    }

    def start(name: str, **changes: object) -> Finished:
        script = InProcess(name, monkeypatch, capsys)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        given = {"model": place / "model", "cache_dir": place / "cache", **settings[name]}
        given |= changes
        return script(*(part for n, v in given.items() if v is not None for part in (f"--{n}", v)))

    return start


def metadata(folder: Path) -> dict[str, object]:
    return ModelCard.load(folder / "README.md").data.to_dict()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(3, 19)[None]).logits


def test_a_classifier_goes_up_in_one_commit_and_comes_back(run: Run, hub: FakeHub, tmp_path: Path):
    output = tmp_path / "out"
    done = run("run_glue", output_dir=output, push_to_hub="small", private=True)
    assert done.code == 0, done.err
    repository = hub.repositories["ada/small"]
    assert repository.private
    assert len(repository.commits) == 1
    assert repository.files == published(output)
    assert [
        name for name, text in repository.files.items() if str(tmp_path.parent).encode() in text
    ] == []
    assert {"README.md", "report.json", "modeling_lowrank.py", "tokenizer.json"} <= set(
        repository.files
    )
    assert f"published as {hub.url}/ada/small/commit/" in done.out
    back = AutoModelForSequenceClassification.from_pretrained(
        "ada/small", cache_dir=tmp_path / "cache"
    )
    assert factorized_layers(back)
    assert torch.equal(logits(back), logits(hf_lowrank.load(output)))
    folder = Path(snapshot_download("ada/small", cache_dir=tmp_path / "cache"))
    assert 'from_pretrained("ada/small")' in (folder / "README.md").read_text("utf-8")
    found = metadata(folder)
    assert found["base_model"] == "acme/encoder"
    assert found["datasets"] == ["nyu-mll/glue"]
    report = load_report(folder)
    assert isinstance(report, TaskReport)
    assert report.command.startswith("python scripts/run_glue.py --model")
    (entry,) = found["model-index"]
    values = {metric["type"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert values == {name: round(value, 4) for name, value in report.metrics.items()}


def test_a_question_answering_model(run: Run, hub: FakeHub, tmp_path: Path):
    done = run("run_qa", output_dir=tmp_path / "out", push_to_hub="ada/small")
    assert done.code == 0, done.err
    assert len(hub.repositories["ada/small"].commits) == 1
    back = AutoModelForQuestionAnswering.from_pretrained("ada/small", cache_dir=tmp_path / "cache")
    assert factorized_layers(back)
    found = metadata(tmp_path / "out")
    assert found["pipeline_tag"] == "question-answering"
    assert found["metrics"] == ["f1", "exact_match"]
    assert not hub.repositories["ada/small"].private


def test_a_card_is_written_where_nothing_is_published(run: Run, hub: FakeHub, tmp_path: Path):
    done = run("run_glue", method="dense", param_ratio=None, output_dir=tmp_path / "out")
    assert done.code == 0, done.err
    assert metadata(tmp_path / "out")["pipeline_tag"] == "text-classification"
    assert hub.requests == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"push_to_hub": "ada/small", "output_dir": "OUT"}, "publishing needs a token; log in"),
        ({"push_to_hub": "ada/small"}, "give --output_dir as well"),
        ({"private": True, "output_dir": "OUT"}, "give --push_to_hub as well"),
        ({"base_model": "a/b/c", "output_dir": "OUT"}, "base_model: Repo id must be"),
    ],
    ids=str,
)
@pytest.mark.parametrize("script", ["run_glue", "run_qa"])
def test_a_mistake_is_found_before_anything_is_read(
    run: Run,
    script: str,
    changes: dict[str, object],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(fine_tuning, "dense_model", lambda *args: pytest.fail("trained"))
    changes = {n: tmp_path / "out" if v == "OUT" else v for n, v in changes.items()}
    changes = {"base_model": None, "model": "nobody/never-read"} | changes
    assert reason in run(script, **changes).error
    assert not (tmp_path / "out").exists()


# train_llm.py


@pytest.fixture
def train(
    hub: FakeHub,
    inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    script = InProcess("train_llm", monkeypatch, capsys)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def start(*more: object) -> Finished:
        texts = ("--train", inputs.calibration, "--evaluation", inputs.evaluation)
        sizes = "--train_sequences 8 --evaluation_sequences 4 --sequence_length 32 --max_steps 2"
        quiet = "--save_strategy no --report_to none --use_cpu True --disable_tqdm True"
        return script("--model", inputs.model, *texts, *sizes.split(), *quiet.split(), *more)

    return start


def test_a_trained_language_model(train: Run, hub: FakeHub, tmp_path: Path):
    goal = ("--target_param_ratio", 0.5, "--selection_steps", 1)
    place = ("--output_dir", tmp_path / "out", "--push_to_hub", "ada/small")
    done = train(*goal, *place, "--base_model", "acme/llama")
    assert done.code == 0, done.err
    repository, final = hub.repositories["ada/small"], tmp_path / "out" / "final"
    assert len(repository.commits) == 1
    assert repository.files == published(final)
    report = load_report(final)
    assert type(report) is Report
    assert (report.architecture, report.base_model) == ("LlamaForCausalLM", "acme/llama")
    text = repository.files["README.md"].decode()
    assert "down to 50.0% of the targeted layers' weights; seed 42." in text
    assert "Training: 256 tokens of calibration.txt." in text
    assert "the dense model was not" in text


def test_without_a_token_nothing_is_trained(
    train: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN")
    done = train("--output_dir", tmp_path / "out", "--push_to_hub", "ada/small")
    assert "publishing needs a token" in done.error
    assert list((tmp_path / "out").iterdir()) == []


def test_the_trainers_own_way_to_the_hub_is_closed(train: Run, tmp_path: Path):
    done = train("--output_dir", tmp_path / "out", "--hub_model_id", "ada/small")
    assert done.code == 2
    assert "unrecognized arguments: --hub_model_id ada/small" in done.err

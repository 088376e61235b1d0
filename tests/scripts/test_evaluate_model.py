"""evaluate_model.py: what it measures, prints and writes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import DataError
from hf_lowrank.evaluation import harness
from hf_lowrank.evaluation.harness import run_tasks
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.inputs.sources import load_any_causal_lm, load_classifier
from hf_lowrank.inputs.text import token_batches
from tests.scripts import InProcess, Inputs, save_checkpoint, word_tokenizer
from tests.tiny_models import tiny_bert_classifier, tiny_llama

PLAIN = LowRankConfig(param_ratio=0.6, metric="plain")
SMALL = ("--evaluation_sequences", 8, "--sequence_length", 32, "--prompt_tokens", 8)


@pytest.fixture(scope="module")
def small(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compressed model."""
    model = tiny_llama()
    hf_lowrank.compress(model, PLAIN, progress=False)
    return save_checkpoint(tmp_path_factory.mktemp("small"), model)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess("evaluate_model", monkeypatch, capsys)


def test_a_compressed_model_beside_its_baseline(
    evaluate: InProcess, inputs: Inputs, small: Path, tmp_path: Path
):
    output = tmp_path / "result.json"
    done = evaluate(
        *("--model", small, "--baseline", inputs.model, "--evaluation", inputs.evaluation),
        *(*SMALL, "--new_tokens", 4, "--repeats", 2, "--output", output),
    )
    assert done.code == 0, done.err
    result = json.loads(output.read_text("utf-8"))
    assert {"command", "commit", "hardware", "versions", "date"} <= set(result)
    text = token_batches(
        str(inputs.evaluation),
        word_tokenizer(),
        sequences=8,
        sequence_length=32,
        role="evaluation",
    )
    losses = {}
    for name, folder in (("model", small), ("baseline", inputs.model)):
        model, _ = load_any_causal_lm(str(folder))
        found = result["models"][name]
        losses[name] = measure_loss(model, text)
        assert found["loss"] == pytest.approx(losses[name].mean)
        assert found["perplexity"] == pytest.approx(losses[name].perplexity)
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
        assert len(found["speed"]["prefill"]) == len(found["speed"]["decode"]) == 2
        assert f"{found['perplexity']:.4f}" in done.out
    comparison = result["comparison"]
    rise = losses["model"].mean - losses["baseline"].mean
    assert comparison["loss_difference"] == pytest.approx(rise)
    seconds = {name: found["speed"]["decode_seconds"] for name, found in result["models"].items()}
    ratio = seconds["baseline"] / seconds["model"]
    assert comparison["decode_speed_up"] == pytest.approx(ratio)


def test_one_model_without_speed_and_text(evaluate: InProcess, small: Path, tmp_path: Path):
    output = tmp_path / "result.json"
    done = evaluate(
        "--model", small, "--evaluation", "none", "--speed", "False", "--output", output
    )
    assert done.code == 0, done.err
    result = json.loads(output.read_text("utf-8"))
    assert set(result["models"]["model"]) == {"parameters", "bytes"}
    assert result["comparison"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "repeats must be an integer >= 1, got 0."),
        (["--evaluation", "missing.txt"], "missing.txt: no such file; correct the path."),
        (["--data_dir", "glue"], "data_dir holds GLUE's files; give --glue_task as well."),
        (["--limit", "8"], "limit is read with tasks alone; give --tasks as well."),
        (["--include_path", "x"], "include_path is read with tasks alone; give --tasks as well."),
        *(
            (
                ["--glue_task", "mrpc", f"--{name}", *value],
                f"glue_task scores classifiers as they are; leave {name} out.",
            )
            for name, *value in (
                *(["int8"], ["tasks", "piqa"], ["include_path", "x"], ["limit", "8"]),
                *(["evaluation", "x.txt"], ["evaluation_sequences", "4"]),
                *(["sequence_length", "8"], ["batch_size", "8"], ["speed", "False"]),
                *(["prompt_tokens", "4"], ["new_tokens", "4"], ["repeats", "1"]),
            )
        ),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    evaluate: InProcess, arguments: list[str], message: str
):
    assert evaluate("--model", "nothing/there", *arguments).error == message


def test_prompts_that_are_too_long_get_one_sentence(evaluate: InProcess, small: Path):
    done = evaluate("--model", small, "--evaluation", "none", "--prompt_tokens", 63)
    assert "63 prompt and 32 new tokens are more than the model reads (64)" in done.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "piqa"], "Tasks need the package lm_eval: pip install lm_eval."),
        (["--int8"], "int8 needs torchao 0.18 or newer: pip install 'torchao>=0.18'."),
    ],
)
def test_missing_packages_get_one_sentence(
    evaluate: InProcess, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert evaluate("--model", "nothing/there", *arguments).error == message


TASK = """\
task: written
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_is_scored_by_lm_eval(small: Path, tmp_path: Path):
    pytest.importorskip("lm_eval")
    rows = [
        {"text": "w01 w02 w03", "choices": ["w04 w05", "w06 w07"], "label": n % 2} for n in range(8)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    (tmp_path / "written.yaml").write_text(TASK.format(data=data), "utf-8")
    model, tokenizer = load_any_causal_lm(str(small))
    found = run_tasks(model, tokenizer, ["written"], include_path=str(tmp_path))
    assert found == {"written": {"acc": 0.5}}  # the same text with both labels in turn
    with pytest.raises(DataError, match="lm-eval has no task nothing"):
        run_tasks(model, tokenizer, ["nothing"], include_path=str(tmp_path))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few examples of RTE in the original format."""
    folder = tmp_path_factory.mktemp("glue") / "RTE"
    folder.mkdir()
    labels = ("entailment", "not_entailment")
    lines = [f"{n}\tw{n:02d} w03\tw05 w{n + 20:02d}\t{labels[n % 2]}" for n in range(20)]
    for name in ("train", "dev"):
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *lines])
        (folder / f"{name}.tsv").write_text(text + "\n", "utf-8")
    return folder.parent


def classifier(folder: Path, num_labels: int, compressed: bool) -> Path:
    model: Any = tiny_bert_classifier()
    model.classifier = torch.nn.Linear(32, num_labels)
    model.config.num_labels = model.num_labels = num_labels
    if compressed:
        hf_lowrank.compress(model, PLAIN, progress=False)
    return save_checkpoint(folder, model)


def test_a_fine_tuned_classifier_is_scored_on_glue(evaluate: InProcess, glue: Path, tmp_path: Path):
    small = classifier(tmp_path / "small", 2, compressed=True)
    dense = classifier(tmp_path / "dense", 2, compressed=False)
    output = tmp_path / "result.json"
    done = evaluate(
        *("--model", small, "--baseline", dense, "--glue_task", "rte", "--data_dir", glue),
        *("--output", output),
    )
    assert done.code == 0, done.err
    result = json.loads(output.read_text("utf-8"))["models"]
    assert all(0 <= result[name]["tasks"]["rte"]["accuracy"] <= 1 for name in result)
    assert result["model"]["parameters"] < result["baseline"]["parameters"]
    assert "rte accuracy" in done.out


def test_a_classifier_of_another_task_is_refused(evaluate: InProcess, glue: Path, tmp_path: Path):
    for compressed in (True, False):
        folder = classifier(tmp_path / str(compressed), 3, compressed)
        done = evaluate("--model", folder, "--glue_task", "rte", "--data_dir", glue)
        assert done.error == f"{folder}: has 3 outputs, the task 2; name its own."


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path)
    with pytest.raises(DataError, match=r"holds a LlamaForCausalLM, not a sequence classifier"):
        load_classifier(str(tmp_path), 2)

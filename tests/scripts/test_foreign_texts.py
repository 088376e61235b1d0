"""Start tokens, mixtures and foreign text, as compress_llm.py and evaluate_model.py use them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowrank.cli import compress_command
from hf_lowrank.errors import DataError
from hf_lowrank.inputs.sources import load_causal_lm
from hf_lowrank.inputs.text import token_batches
from tests.scripts import InProcess, Inputs, Refusal, save_checkpoint, word_tokenizer
from tests.scripts.outputs import read_report
from tests.tiny_models import tiny_llama

BEGIN = 1  # <s>


@pytest.fixture
def starting(inputs: Inputs, tmp_path: Path) -> Inputs:
    """The model with a tokenizer that puts `<s>` before a text."""
    folder = save_checkpoint(tmp_path / "starting")
    words = word_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    words.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("w01")["input_ids"][0] == BEGIN
    return inputs._replace(model=folder)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The batches that `compress` gets."""
    found: dict[str, Any] = {}
    compress = compress_command.compress

    def spy(model: Any, config: Any, **kwargs: Any) -> Any:
        found.update(kwargs)
        return compress(model, config, **kwargs)

    monkeypatch.setattr(compress_command, "compress", spy)
    return found


def test_every_window_of_a_run_begins_with_the_start_token(
    compress_llm: InProcess, starting: Inputs, seen: dict[str, Any], tmp_path: Path
):
    arguments = starting.arguments(
        loss_tolerance=0.1, foreign_evaluation=None, output_dir=tmp_path / "small"
    )
    assert compress_llm(*arguments).code == 0
    for role in ("calibration", "held_out", "evaluation", "foreign"):
        for batch in seen[role]:
            assert (batch["input_ids"][:, 0] == BEGIN).all()
            assert batch["input_ids"].shape[1] == 32
    report = read_report(tmp_path / "small")
    assert report["data"]["start_token"] == "<s>"
    assert report["evaluation"]["tokens"] == 16 * 31  # the start itself is no target


def test_the_loss_is_that_of_text_after_the_start_token(
    compress_llm: InProcess, starting: Inputs, tmp_path: Path
):
    arguments = starting.arguments(
        param_ratio=1.0, metric="plain", evaluation_sequences=4, output_dir=tmp_path / "small"
    )
    assert compress_llm(*arguments).code == 0
    ids = word_tokenizer()(starting.evaluation.read_text("utf-8"))["input_ids"]
    stride = (len(ids) - 31) // 3
    rows = [[BEGIN, *ids[i * stride : i * stride + 31]] for i in range(4)]
    batch = torch.tensor(rows)
    model = AutoModelForCausalLM.from_pretrained(starting.model)
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
    found = read_report(tmp_path / "small")["evaluation"]["loss_before"]
    assert found == pytest.approx(loss, abs=1e-5)


def test_a_model_without_a_start_token_reads_the_text_as_it_is(
    compress_llm: InProcess, inputs: Inputs, seen: dict[str, Any], tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "small"))
    ids = word_tokenizer()(inputs.calibration.read_text("utf-8"))["input_ids"]
    stride = (len(ids) - 32) // 15
    windows = torch.cat([batch["input_ids"] for batch in seen["calibration"]]).tolist()
    assert windows == [ids[i * stride : i * stride + 32] for i in range(16)]
    assert "start_token" not in read_report(tmp_path / "small")["data"]


def test_evaluate_model_follows_the_tokenizer(
    starting: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    evaluate = InProcess("evaluate_model", monkeypatch, capsys)
    output = tmp_path / "result.json"
    done = evaluate(
        *("--model", starting.model, "--evaluation", starting.evaluation),
        *("--evaluation_sequences", 8, "--sequence_length", 32, "--speed", "False"),
        *("--output", output),
    )
    assert done.code == 0, done.err
    result = json.loads(output.read_text("utf-8"))
    assert result["start_token"] == "<s>"
    _, tokenizer = load_causal_lm(str(starting.model))
    batches = token_batches(
        str(starting.evaluation), tokenizer, sequences=8, sequence_length=32, role="evaluation"
    )
    model, total = tiny_llama().eval(), 0.0
    with torch.no_grad():
        for batch in batches:
            total += float(model(**batch, labels=batch["input_ids"]).loss)
    assert result["models"]["model"]["loss"] == pytest.approx(total / len(batches), abs=1e-5)


def test_the_foreign_text_is_measured_and_named(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(["w09 w03 w11"] * 400), "utf-8")
    done = compress_llm(
        *inputs.arguments(param_ratio=0.6, foreign_evaluation=other, output_dir=tmp_path / "small")
    )
    report = read_report(tmp_path / "small")
    assert report["data"]["foreign"] == str(other)
    found = report["foreign_evaluation"]
    assert found["tokens"] == 16 * 31
    assert found["perplexity_before"] != report["evaluation"]["perplexity_before"]
    assert f"tokens of foreign text ({other}), unlike the calibration's" in done.out


def test_a_sweep_measures_the_foreign_text_at_each_size(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(["w09 w03 w11"] * 400), "utf-8")
    arguments = inputs.arguments(foreign_evaluation=other, output_dir=tmp_path / "small")
    done = compress_llm(*arguments, "--param_ratio", 0.8, 0.6)
    assert done.code == 0, done.err
    reports = [read_report(tmp_path / "small" / size) for size in ("0.8", "0.6")]
    assert [each["data"]["foreign"] for each in reports] == [str(other)] * 2
    losses = [each["foreign_evaluation"]["loss_after"] for each in reports]
    assert losses[0] != losses[1]
    assert "perplexity, foreign text" in done.out.splitlines()[-3]


def test_a_mixture_calibrates_on_its_shares(
    compress_llm: InProcess, inputs: Inputs, seen: dict[str, Any], tmp_path: Path
):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(["w09"] * 2000), "utf-8")
    mixture = f"{inputs.calibration} + {other}:0.25"
    arguments = inputs.arguments(
        loss_tolerance=0.1, calibration=mixture, output_dir=tmp_path / "small"
    )
    assert compress_llm(*arguments).code == 0
    (w09,) = word_tokenizer()("w09")["input_ids"]
    for role, count in (("calibration", 16), ("held_out", 8)):
        windows = torch.cat([batch["input_ids"] for batch in seen[role]])
        assert len(windows) == count
        assert int((windows == w09).all(dim=1).sum()) == count // 4
    assert read_report(tmp_path / "small")["data"]["calibration"] == mixture


@pytest.mark.usefixtures("no_model")
def test_a_text_with_two_roles_is_refused(refused: Refusal, inputs: Inputs):
    for changes, sentence in (
        ({"foreign_evaluation": inputs.calibration}, "both calibration and foreign text"),
        ({"foreign_evaluation": inputs.evaluation}, "both evaluation and foreign text"),
        (
            {"calibration": f"demo + {inputs.evaluation}"},
            "both calibration and evaluation text",
        ),
    ):
        assert sentence in refused(**changes)


@pytest.mark.usefixtures("no_model")
def test_a_foreign_text_alone_is_refused(refused: Refusal, inputs: Inputs):
    error = refused(evaluation="none", foreign_evaluation="demo")
    assert error == "foreign_evaluation is a second text; give --evaluation as well."


@pytest.mark.usefixtures("no_model")
def test_wrong_shares_are_refused_before_a_model_is_loaded(refused: Refusal):
    assert "the shares of a mixture must be above 0 and sum to 1" in refused(
        calibration="demo:0.7 + demo-graphs:0.7"
    )


def with_own_code(folder: Path) -> Path:
    """A checkpoint whose model class lies beside the weights."""
    save_checkpoint(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["model_type"] = "mine"
    config["auto_map"] = {
        "AutoConfig": "mine.MineConfig",
        "AutoModelForCausalLM": "mine.MineForCausalLM",
    }
    path.write_text(json.dumps(config), "utf-8")
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n",
        "utf-8",
    )
    return folder


def test_code_of_a_model_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = with_own_code(tmp_path / "mine")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    with pytest.raises(DataError) as caught:
        load_causal_lm(str(folder))
    assert str(caught.value) == (
        f"{folder}: comes with Python code of its own that must run to load it; read that code, "
        "and if you trust it, give --trust_remote_code."
    )
    model, _ = load_causal_lm(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "MineForCausalLM"

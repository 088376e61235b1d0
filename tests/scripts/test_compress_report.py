"""What compress_llm.py reports: report.json, the printed table, the page and the speed."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowrank
from tests.scripts import InProcess, Inputs
from tests.scripts.outputs import CHECKPOINT_FILES, read_report


def continuation(folder: Path, prompt: str) -> str:
    """40 greedy tokens, without the library's code."""
    tokenizer, model = (
        auto.from_pretrained(folder) for auto in (AutoTokenizer, AutoModelForCausalLM)
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    size = ids.shape[1]
    for _ in range(40):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
        if following == tokenizer.eos_token_id:
            break
    text: str = tokenizer.decode(ids[0, size:], skip_special_tokens=True)
    return text


def test_report_has_the_promised_fields_with_their_types(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.8, seed=7, output_dir=tmp_path / "small"))
    report = read_report(tmp_path / "small")
    assert report["model"] == str(inputs.model)
    assert report["seed"] == 7
    assert report["config"]["param_ratio"] == 0.8
    assert report["config"]["metric"] == "kfac"
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    assert all(isinstance(version, str) for version in report["versions"].values())
    counts = {"dense", "kept", "targeted_dense", "targeted_kept"}
    assert set(report["parameters"]) == counts
    assert set(report["bytes"]) == {"dense", "kept"}
    for sizes in (report["parameters"], report["bytes"]):
        assert all(type(size) is int and size > 0 for size in sizes.values())
    numbers = {
        "perplexity_before",
        "perplexity_after",
        "loss_before",
        "loss_after",
        "loss_difference",
        "standard_error",
    }
    assert set(report["evaluation"]) == numbers | {"tokens"}
    assert all(type(report["evaluation"][name]) is float for name in numbers)
    assert type(report["evaluation"]["tokens"]) is int
    assert {"statistics", "decomposition", "evaluation"} <= set(report["seconds"])
    assert all(type(value) is float and value >= 0 for value in report["seconds"].values())
    assert report["probes"] == []


def test_report_names_the_version_of_hf_lowrank(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.8, output_dir=tmp_path / "small"))
    versions = read_report(tmp_path / "small")["versions"]
    assert versions.get("hf-lowrank") == hf_lowrank.__version__


def test_the_report_says_which_text_was_used(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(
        *inputs.arguments(
            param_ratio=0.8,
            calibration_sequences=6,
            sequence_length=20,
            output_dir=tmp_path / "small",
        )
    )
    assert read_report(tmp_path / "small")["data"] == {
        "calibration_tokens": 120,
        "calibration": str(inputs.calibration),
        "evaluation": str(inputs.evaluation),
    }


def test_the_table_shows_what_the_report_holds(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    done = compress_llm(*inputs.arguments(param_ratio=0.7, output_dir=tmp_path / "small"))
    report = read_report(tmp_path / "small")
    evaluation, parameters = report["evaluation"], report["parameters"]
    lines = [line.split() for line in done.out.splitlines()]
    kept = f"{parameters['kept'] / parameters['dense']:.2%}"
    assert ["parameters", f"{parameters['dense']:,}", f"{parameters['kept']:,}", kept] in lines
    perplexities = [f"{evaluation[key]:.2f}" for key in ("perplexity_before", "perplexity_after")]
    assert ["perplexity", *perplexities] in lines
    difference, error = evaluation["loss_difference"], evaluation["standard_error"]
    assert f"loss difference {difference:+.4f} +- {error:.4f} nats per token" in done.out
    down = [rank for name, rank in report["ranks"].items() if name.endswith("down_proj")]
    row = next(line for line in lines if line and line[0] == "down_proj")
    assert row[1:3] == ["2", str(down.count(None))]
    assert f"statistics {report['seconds']['statistics']:.1f}, decomposition " in done.out


def test_evaluation_can_be_skipped(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    done = compress_llm(
        *inputs.arguments(param_ratio=0.7, evaluation="none", output_dir=tmp_path / "small")
    )
    assert done.code == 0
    assert read_report(tmp_path / "small")["evaluation"] is None
    assert "perplexity" not in done.out
    assert "predicted by the prices" in done.out


def test_the_speed_is_measured_unless_it_is_not_wanted(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(speed=None, evaluation="none", metric="plain")
    sizes = ("--param_ratio", "0.7", "0.4", "--output_dir", tmp_path / "timed")
    done = compress_llm(*arguments, *sizes)
    assert done.code == 0
    assert done.messages == []
    for size in ("0.7", "0.4"):
        report = read_report(tmp_path / "timed" / size)
        rates = [
            f"{report['speed'][side]['decode_tokens_per_second']:,.1f}"
            for side in ("dense", "compressed")
        ]
        assert f"decode (tokens/s) {' '.join(rates)} " in " ".join(done.out.split())
        assert report["seconds"]["speed"] > 0
    assert done.out.splitlines()[-3].endswith("prefill speed-up  decode speed-up")
    other = ("--no_speed", "--param_ratio", "0.7", "--output_dir", tmp_path / "untimed")
    done = compress_llm(*arguments, *other)
    report = read_report(tmp_path / "untimed")
    assert report["speed"] is None
    assert "speed" not in report["seconds"]
    assert not any(word in done.out for word in ("tokens/s", "speed-up", "speed 0", "machine"))


def test_the_report_has_a_page_and_both_models_words(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(
        output_dir=tmp_path / "sizes", html_report=True, sample_prompt="w01 w02 w03"
    )
    done = compress_llm(*arguments, "--param_ratio", "0.9", "0.3")
    assert done.code == 0
    assert done.messages == []
    names = {path.name for path in (tmp_path / "sizes").iterdir()}
    assert names == {"0.9", "0.3", "compare.html"}
    curve = (tmp_path / "sizes" / "compare.html").read_text("utf-8")
    for ratio in ("0.9", "0.3"):
        folder = tmp_path / "sizes" / ratio
        assert {path.name for path in folder.iterdir()} == CHECKPOINT_FILES | {"report.html"}
        (sample,) = read_report(folder)["samples"]
        assert sample["prompt"] == "w01 w02 w03"
        for model, key in ((inputs.model, "dense"), (folder, "compressed")):
            assert sample[key] == continuation(model, "w01 w02 w03")
            assert sample[key] in (folder / "report.html").read_text("utf-8")
            assert sample[key] in curve
        assert "report.html" in (folder / "README.md").read_text("utf-8")


def test_without_matplotlib_the_page_is_left_out_and_one_sentence_says_so(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = tmp_path / "small"
    done = compress_llm(*inputs.arguments(param_ratio=0.8, output_dir=output, html_report=True))
    assert done.code == 0
    assert {path.name for path in output.iterdir()} == CHECKPOINT_FILES
    assert done.messages == [
        "report.html is left out: it needs matplotlib (pip install 'hf-lowrank[plots]')"
    ]

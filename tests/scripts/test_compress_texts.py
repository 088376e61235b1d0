"""Texts that compress_llm.py reads and shares out, and the cache of what it measured on them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

import hf_lowrank
from hf_lowrank.cli import compress_command
from hf_lowrank.inputs import sources
from tests.scripts import InProcess, Inputs, Refusal
from tests.scripts.outputs import read_report


def test_held_out_text_is_not_calibration_text(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = {}
    compress = compress_command.compress

    def spy(model: Any, config: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return compress(model, config, **kwargs)

    monkeypatch.setattr(compress_command, "compress", spy)
    compress_llm(*inputs.arguments(loss_tolerance=0.1))
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    tokens = tokenizer(inputs.calibration.read_text("utf-8"))["input_ids"]
    parts = {
        "calibration": tokens[: 3 * len(tokens) // 4],
        "held_out": tokens[3 * len(tokens) // 4 :],
    }
    for role, part in parts.items():
        starts = {tuple(part[i : i + 32]) for i in range(len(part) - 31)}
        windows = [tuple(row) for batch in seen[role] for row in batch["input_ids"].tolist()]
        assert len(windows) == {"calibration": 16, "held_out": 8}[role]
        assert set(windows) <= starts


def test_the_demo_reads_built_in_texts_alone(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "demo_folder", lambda: inputs.model)
    done = compress_llm(
        *inputs.arguments(
            model=None,
            calibration=None,
            evaluation=None,
            foreign_evaluation=None,
            output_dir=tmp_path / "small",
        )
    )
    assert done.code == 0
    report = read_report(tmp_path / "small")
    assert report["model"] == "demo"
    texts = {role: report["data"][role] for role in ("calibration", "evaluation", "foreign")}
    assert texts == {
        "calibration": "demo + demo-graphs:0.25",
        "evaluation": "demo",
        "foreign": "demo-licenses",
    }
    assert report["probes"]


def as_jsonl(text: str, path: Path) -> None:
    path.write_text(json.dumps({"id": 1, "text": text}) + "\n\n", encoding="utf-8")


def as_parquet(text: str, path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": [text], "id": [1]}), path)


@pytest.mark.parametrize(
    ("write", "suffix"), [(as_jsonl, "jsonl"), (as_parquet, "parquet")], ids=["jsonl", "parquet"]
)
def test_other_file_types_give_the_same_result_as_plain_text(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, write: Any, suffix: str
):
    changed = {}
    for role in ("calibration", "evaluation"):
        changed[role] = tmp_path / f"{role}.{suffix}"
        write(getattr(inputs, role).read_text("utf-8"), changed[role])
    for name, changes in (("txt", {}), (suffix, changed)):
        arguments = inputs.arguments(param_ratio=0.6, output_dir=tmp_path / name, **changes)
        assert compress_llm(*arguments).code == 0
    plain, other = read_report(tmp_path / "txt"), read_report(tmp_path / suffix)
    assert other["evaluation"] == plain["evaluation"]
    assert (tmp_path / suffix / "model.safetensors").read_bytes() == (
        tmp_path / "txt" / "model.safetensors"
    ).read_bytes()


def test_a_second_run_takes_moments_and_spectra_from_the_cache(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def arguments(name: str) -> list[str]:
        return inputs.arguments(
            param_ratio=0.6, output_dir=tmp_path / name, cache_dir=tmp_path / "cache"
        )

    compress_llm(*arguments("first"))
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert sorted(name.partition("-")[0] for name in written) == ["moments", "spectra"]
    for name in ("collect_moments", "decompose"):
        monkeypatch.setattr(hf_lowrank.compression.analysis, name, None)
    assert compress_llm(*arguments("second")).code == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == written
    first, second = read_report(tmp_path / "first"), read_report(tmp_path / "second")
    assert second["ranks"] == first["ranks"]
    assert second["evaluation"] == first["evaluation"]
    assert not {"statistics", "decomposition"} & set(second["seconds"])
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()


def test_a_run_killed_after_calibration_goes_on_from_its_moments(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = inputs.arguments(param_ratio=0.6, cache_dir=tmp_path / "cache")

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hf_lowrank.compression.analysis, "decompose", killed)
        assert compress_llm(*arguments).code == 130
    monkeypatch.setattr(hf_lowrank.compression.analysis, "collect_moments", None)
    output = tmp_path / "small"
    assert compress_llm(*arguments, "--output_dir", output).code == 0
    monkeypatch.undo()
    compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "fresh"))
    assert (output / "model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "model.safetensors"
    ).read_bytes()


@pytest.mark.usefixtures("no_calibration")
def test_a_cache_folder_that_is_a_file(refused: Refusal, tmp_path: Path):
    (tmp_path / "cache").write_text("keep")
    assert str(tmp_path / "cache") in refused(cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "keep"


def test_a_model_may_write_its_own_calibration_text(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    cache, outputs = tmp_path / "cache", [tmp_path / "first", tmp_path / "second"]
    for output in outputs:
        changes = {"calibration": f"{inputs.calibration} + generated:0.5", "cache_dir": cache}
        done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=output, **changes))
        assert done.code == 0
    reports = [read_report(output) for output in outputs]
    assert reports[0]["data"]["calibration"] == f"{inputs.calibration} + generated:0.5"
    assert reports[0]["ranks"] == reports[1]["ranks"]
    assert len(list(cache.glob("text-*.pt"))) == 1  # read, the second time


def test_a_model_is_not_judged_on_its_own_text(refused: Refusal):
    error = refused(evaluation="generated")
    assert "'generated' is calibration text, written by the model itself" in error

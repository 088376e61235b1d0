"""Where compress_llm.py saves: folders it makes, uses or replaces, and those that it refuses."""

import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from hf_lowrank.cli import compress_command
from tests.scripts import InProcess, Inputs, Refusal, leftovers
from tests.scripts.outputs import CHECKPOINT_FILES, read_report

DiskUsage = namedtuple("DiskUsage", "total used free")


def test_one_ratio_is_saved_into_the_output_folder_itself(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    output = tmp_path / "new" / "small"
    done = compress_llm(*inputs.arguments(param_ratio=0.8, output_dir=output))
    assert done.code == 0
    assert {path.name for path in output.iterdir()} == CHECKPOINT_FILES
    assert [path.name for path in output.parent.iterdir()] == ["small"]
    assert f"saved to {output}\n" in done.out
    assert done.messages == []


def test_an_old_output_folder_is_replaced_when_asked_for(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    output = tmp_path / "small"
    for ratio in (0.9, 0.5):
        done = compress_llm(
            *inputs.arguments(param_ratio=ratio, output_dir=output), "--overwrite_output_dir"
        )
        assert done.code == 0
        (output / "stale.txt").write_text("old")
    (output / "stale.txt").unlink()
    assert {path.name for path in output.iterdir()} == CHECKPOINT_FILES
    assert read_report(output)["config"]["param_ratio"] == 0.5
    assert leftovers(tmp_path) == []


def test_an_empty_output_folder_is_used(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    (tmp_path / "small").mkdir()
    done = compress_llm(*inputs.arguments(param_ratio=0.9, output_dir=tmp_path / "small"))
    assert done.code == 0
    assert (tmp_path / "small" / "config.json").is_file()


def test_a_relative_output_folder_is_taken_from_the_current_folder(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert compress_llm(*inputs.arguments(param_ratio=0.9, output_dir="a/b/")).code == 0
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_without_an_output_folder_nothing_is_written(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = compress_llm(*inputs.arguments(param_ratio=0.7))
    assert done.code == 0
    assert "saved to" not in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_model")
def test_an_output_folder_that_holds_something(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine.txt").write_text("keep")
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.error == (
        f"{tmp_path / 'output'}: exists and is not empty; choose another --output_dir or add "
        "--overwrite_output_dir."
    )
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("no_model")
def test_an_output_folder_that_is_a_file(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    (tmp_path / "output").write_text("keep")
    for arguments in ((), ("--overwrite_output_dir",)):
        done = compress_llm(
            *inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"), *arguments
        )
        assert done.error == f"{tmp_path / 'output'}: is a file, not a folder; name another one."
        assert (tmp_path / "output").read_text() == "keep"


@pytest.mark.usefixtures("no_model")
def test_an_output_folder_below_a_file(refused: Refusal, inputs: Inputs):
    folder = inputs.calibration / "below"
    assert refused(output_dir=folder).startswith(f"{folder}: can't be created (")


@pytest.mark.usefixtures("no_model")
def test_an_output_folder_where_nothing_may_be_written(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refused() == f"{tmp_path / 'output'}: no permission to write there; name another folder."


@pytest.mark.usefixtures("no_model")
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_output_folder_without_permission(refused: Refusal, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    folder = tmp_path / "locked" / "output"
    assert (
        refused(output_dir=folder)
        == f"{folder}: no permission to write there; name another folder."
    )


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("folder", [".", ".."])
def test_the_folder_that_one_works_in_is_not_replaced(
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("keep")
    monkeypatch.chdir(tmp_path / "here")
    done = compress_llm(
        *inputs.arguments(param_ratio=0.6, output_dir=folder), "--overwrite_output_dir"
    )
    assert str(Path(folder).resolve()) in done.error or f"{folder}: " in done.error
    assert (tmp_path / "here" / "mine.txt").read_text() == "keep"


@pytest.mark.usefixtures("no_model")
def test_the_dense_model_is_not_replaced_by_the_compressed_one(
    compress_llm: InProcess, inputs: Inputs, broken: Path
):
    before = (broken / "model.safetensors").read_bytes()
    done = compress_llm(
        *inputs.arguments(model=broken, param_ratio=0.6, output_dir=broken),
        "--overwrite_output_dir",
    )
    assert str(broken) in done.error
    assert (broken / "model.safetensors").read_bytes() == before


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("role", ["model", "calibration", "evaluation"])
def test_what_the_run_reads_is_not_replaced_with_its_folder(
    compress_llm: InProcess, inputs: Inputs, broken: Path, tmp_path: Path, role: str
):
    output, path = tmp_path / "outputs", tmp_path / "outputs" / "deep" / "mine"
    path.parent.mkdir(parents=True)
    shutil.move(broken if role == "model" else shutil.copy(inputs.evaluation, tmp_path), path)
    before = sorted(tmp_path.rglob("*"))
    arguments = inputs.arguments(**{role: path}, param_ratio=0.6, output_dir=output)
    done = compress_llm(*arguments, "--overwrite_output_dir")
    assert done.error == (
        f"{output}: would replace {path}, which this run reads; name another output folder."
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("arguments", [(), ("--overwrite_output_dir",)])
def test_a_cache_inside_the_output_folder(
    refused: Refusal, tmp_path: Path, arguments: tuple[str, ...]
):
    cache = tmp_path / "output" / "cache"
    assert refused(*arguments, cache_dir=cache) == (
        f"{cache}: the cache can't lie in the output folder {tmp_path / 'output'}; name a folder "
        "beside it."
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run_glue", ()),
        ("run_qa", ("--data_file", "none.json")),
        ("run_ner", ("--train_file", "none.txt", "--data_file", "none.txt")),
    ],
)
def test_a_cache_inside_the_output_folder_of_a_task(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: tuple[str, ...],
):
    folders = ("--output_dir", tmp_path, "--cache_dir", tmp_path / "dense")
    done = InProcess(name, monkeypatch, capsys)("--param_ratio", 0.5, *folders, *arguments)
    assert done.error == (
        f"{tmp_path / 'dense'}: the cache can't lie in the output folder {tmp_path}; name a folder "
        "beside it."
    )


def test_a_folder_called_demo_is_not_the_demo_model(
    compress_llm: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neither the model nor a text: a run that replaces it gets as far as loading the model."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compress_command, "load_causal_lm", lambda *args: sys.exit(5))
    done = compress_llm("--param_ratio", 0.6, "--output_dir", "demo", "--overwrite_output_dir")
    assert done.code == 5


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    ("ratios", "free"),
    [(["0.6"], 30_000), (["0.9", "0.6"], 100_000), (["0.2"], 25_000)],
    ids=["one", "several", "embeddings count in full"],
)
def test_a_disk_with_too_little_space(
    refused: Refusal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ratios: list[str],
    free: int,
):
    # The dense model takes 86,656 bytes: 73,728 in targeted layers and 12,928 in all others.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9 - free, free))
    error = refused("--param_ratio", *ratios, param_ratio=None)
    assert error.startswith(f"{tmp_path / 'output'}: needs about ")
    assert error.endswith("MB left.")


def test_a_disk_with_enough_space(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 0, 100_000))
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.code == 0

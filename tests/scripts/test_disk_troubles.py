"""Full disks, folders that nobody may write, that vanish or that two runs share: one sentence, and
nothing half-written under a final name."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_lowrank
from hf_lowrank.cli import jobs
from hf_lowrank.report.schema import Report
from tests.scripts import Finished, InProcess, Inputs, Refusal, leftovers, save_encoder
from tests.scripts.test_run_glue import pairs
from tests.scripts.test_run_glue import settings as glue_settings

Run = Callable[..., Finished]


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_file(tensors: object, path: Any, **kwargs: Any) -> None:
    Path(path).write_bytes(b"half")
    full_disk()


@pytest.fixture
def run_glue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    place = tmp_path / "place"
    save_encoder(place / "model")
    (place / "train.tsv").write_text(pairs(24, 0))
    (place / "dev.tsv").write_text(pairs(12, 1))
    script = InProcess("run_glue", monkeypatch, capsys)

    def start(**changes: object) -> Finished:
        fast = {"param_ratio": 0.5, "dense_epochs": 0, "epochs": 0, "output_dir": tmp_path / "out"}
        given = glue_settings(place, **{**fast, **changes})
        return script(*(part for n, v in given.items() for part in (f"--{n}", v)))

    return start


@pytest.fixture
def train_llm(
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    script = InProcess("train_llm", monkeypatch, capsys)

    def start() -> Finished:
        texts = ("--train", inputs.calibration, "--evaluation", inputs.evaluation)
        sizes = "--train_sequences 8 --evaluation_sequences 4 --sequence_length 32 --max_steps 2"
        more = "--save_steps 1 --report_to none --use_cpu True --disable_tqdm True"
        goal = ("--target_param_ratio", 0.5, "--selection_steps", 1)
        place = ("--model", inputs.model, "--output_dir", tmp_path / "out")
        return script(*place, *texts, *sizes.split(), *more.split(), *goal)

    return start


def test_a_disk_that_fills_up_while_the_cache_is_written(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.save", half_a_file)
    cache = tmp_path / "cache"
    error = refused(cache_dir=cache)
    assert error.startswith(
        f"Could not write to the cache folder {cache}: [Errno 28] No space left"
    )
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("step", ["dense model", "result"])
def test_a_disk_that_fills_up_while_a_task_is_saved(
    run_glue: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    if step == "result":
        assert run_glue(output_dir=tmp_path / "first").code == 0
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half_a_file)
    error = run_glue().error
    folder = tmp_path / ("out" if step == "result" else "place/cache")
    assert error.startswith(str(folder))
    assert "could not be written ([Errno 28] No space left on device)" in error
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "failure", "message"),
    [
        ("transformers.modeling_utils.safe_save_file", half_a_file, "No space left on device"),
        ("transformers.trainer_callback.TrainerState.save_to_json", full_disk, "No space left"),
    ],
)
def test_a_disk_that_fills_up_while_a_training_run_is_saved(
    train_llm: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    failure: Any,
    message: str,
):
    monkeypatch.setattr(step, failure)
    assert message in train_llm().error
    assert not (tmp_path / "out" / "final").exists()


def test_an_optimizer_that_finds_no_space_is_one_sentence_too(
    train_llm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """/dev/full takes a file's opening and none of its bytes."""
    save = hf_lowrank.training.trainer.LowRankTrainer._save_optimizer_and_scheduler

    def save_to_a_full_disk(self: Any, folder: str) -> None:
        (Path(folder) / "optimizer.pt").symlink_to("/dev/full")
        save(self, folder)

    monkeypatch.setattr(
        hf_lowrank.training.trainer.LowRankTrainer,
        "_save_optimizer_and_scheduler",
        save_to_a_full_disk,
    )
    error = train_llm().error
    assert error.startswith("a file could not be written, the disk may be full ([enforce fail at ")
    assert not (tmp_path / "out" / "final").exists()


def test_a_cache_that_nobody_may_write_is_refused_before_a_task_is_read(
    run_glue: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "hf_lowrank.tasks.task_run.dense_model", lambda *args: pytest.fail("trained")
    )
    (tmp_path / "file").write_text("keep")
    folder = tmp_path / "file" / "cache"
    assert run_glue(cache_dir=folder).error == f"{folder}: can't be a folder (Not a directory)."
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    folder = tmp_path / "locked"
    assert (
        run_glue(cache_dir=folder).error
        == f"{folder}: no permission to write there; name another folder."
    )


def test_a_folder_that_becomes_read_only_during_the_run(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mkdir = Path.mkdir

    def read_only(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name.startswith(".output.tmp-"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert refused() == (
        f"{tmp_path / 'output'}: could not be written ([Errno 30] Read-only file system)."
    )


def test_an_output_folder_that_vanishes_before_it_is_written_is_made_again(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    deep, save = tmp_path / "deep", jobs.save_compressed

    def vanish(*args: Any, **kwargs: Any) -> None:
        shutil.rmtree(deep)
        save(*args, **kwargs)

    monkeypatch.setattr(jobs, "save_compressed", vanish)
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=deep / "output"))
    assert done.code == 0
    hf_lowrank.load(deep / "output")


def test_a_folder_that_vanishes_while_it_is_written(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The tokenizer's own saving makes the folder again; the weights are gone."""
    step = "transformers.PreTrainedTokenizerFast.save_pretrained"

    def vanish(self: Any, folder: Path, **kwargs: Any) -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    monkeypatch.setattr(step, vanish)
    assert refused() == (
        f"{tmp_path / 'output'}: could not be written (its temporary folder was removed meanwhile)."
    )


def test_a_second_run_into_one_folder_leaves_the_first_ones_result(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output, save = tmp_path / "output", Report.save

    def faster(self: Report, path: Path) -> None:
        """Another run's folder appears while this one's is written."""
        save(self, path)
        shutil.copytree(inputs.model, output)

    monkeypatch.setattr(Report, "save", faster)
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=output))
    assert done.error == (
        f"{output}: could not be written (it holds files that another run wrote meanwhile)."
    )
    assert (output / "config.json").read_bytes() == (inputs.model / "config.json").read_bytes()
    assert leftovers(tmp_path) == []

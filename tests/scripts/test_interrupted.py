"""Full disks, interrupts and kills: compress_llm.py leaves nothing half-done that would load."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank.format.bundle import loading_code
from tests.scripts import ROOT, Finished, InProcess, Inputs, Refusal, run_python

SAVE_STEPS = [
    ("hf_lowrank.format.marking.loading_code", "the loading code"),
    ("transformers.modeling_utils.safe_save_file", "the weights"),
    ("transformers.PreTrainedTokenizerFast.save_pretrained", "the tokenizer"),
    ("hf_lowrank.report.schema.Report.save", "the report"),
    ("huggingface_hub.ModelCard.save", "the card"),
    ("pathlib.Path.rename", "the final name"),
]
KILL = "lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)"


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def in_new_process(inputs: Inputs, output: Path, before: str, **changes: object) -> Finished:
    """Runs the script in a new process after some statements."""
    script = str(ROOT / "scripts" / "compress_llm.py")
    arguments = inputs.arguments(param_ratio=0.8, output_dir=output, **changes)
    code = (
        f"import os, signal, sys, runpy\n{before}\nsys.argv = {[script, *arguments]!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    return run_python("-c", code)


@pytest.mark.parametrize("step", [step for step, _ in SAVE_STEPS], ids=[n for _, n in SAVE_STEPS])
def test_a_disk_that_fills_up_while_saving(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    monkeypatch.setattr(step, full_disk)
    error = refused()
    assert error.startswith(f"{tmp_path / 'output'}: could not be written (")
    assert "No space left on device" in error


@pytest.mark.parametrize("step", [step for step, _ in SAVE_STEPS], ids=[n for _, n in SAVE_STEPS])
def test_an_interrupt_while_saving(
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
):
    monkeypatch.setattr(step, interrupt)
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.code == 130
    assert done.messages == ["interrupted; nothing was saved under the output folder's name"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "step",
    [
        "hf_lowrank.compression.analysis.collect_moments",
        "hf_lowrank.inputs.sources.AutoTokenizer.from_pretrained",
    ],
)
def test_an_interrupt_during_the_work(
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
):
    monkeypatch.setattr(step, interrupt)
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.code == 130
    assert len(done.messages) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [step for step, _ in SAVE_STEPS[:-1]])
def test_the_old_folder_stays_when_the_new_one_cannot_be_written(
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine.txt").write_text("keep")
    monkeypatch.setattr(step, full_disk)
    done = compress_llm(
        *inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"),
        "--overwrite_output_dir",
    )
    assert "No space left on device" in done.error
    assert (tmp_path / "output" / "mine.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_sizes_finished_before_a_failure_stay_whole(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = hf_lowrank.Report.save

    def fail_on_second(self: hf_lowrank.Report, path: Path) -> None:
        if self.config.param_ratio == 0.5:
            full_disk()
        save(self, path)

    monkeypatch.setattr(hf_lowrank.Report, "save", fail_on_second)
    output = tmp_path / "output"
    done = compress_llm(*inputs.arguments(output_dir=output), "--param_ratio", "0.8", "0.5")
    assert f"{output / '0.5'}: could not be written" in done.error
    assert [path.name for path in output.iterdir()] == ["0.8"]
    assert hf_lowrank.load(output / "0.8") is not None


def test_a_process_that_may_not_write_large_files(inputs: Inputs, tmp_path: Path):
    """The weights, some 140 kB in double precision, break off half-way; all other files fit."""
    resource = pytest.importorskip("resource")
    limit = 100_000
    assert len(loading_code().encode()) < limit
    model = Path(shutil.copytree(inputs.model, tmp_path / "dense"))
    AutoModelForCausalLM.from_pretrained(model).double().save_pretrained(model)
    done = in_new_process(
        inputs,
        tmp_path / "output",
        f"import resource\nresource.setrlimit({resource.RLIMIT_FSIZE}, ({limit}, {limit}))",
        model=model,
    )
    assert done.error.startswith(f"{tmp_path / 'output'}: could not be written (")
    assert "File too large" in done.error
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("before", "leaves"),
    [
        (f"import hf_lowrank.compression.analysis as a\na.decompose = {KILL}", False),
        (f"import transformers.modeling_utils as m\nm.safe_save_file = {KILL}", True),
    ],
    ids=["after calibration", "while the weights are saved"],
)
def test_a_killed_run_leaves_nothing_that_loads(
    inputs: Inputs, tmp_path: Path, before: str, leaves: bool
):
    done = in_new_process(inputs, tmp_path / "output", before)
    assert done.code == -9
    assert not (tmp_path / "output").exists()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert bool(left) == leaves
    for folder in left:
        with pytest.raises(OSError, match=r"no file named|Error no file"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_what_a_killed_run_left_is_no_obstacle_to_the_next(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    """Process ids come back; in containers they are often the same every time."""
    left = tmp_path / f".output.tmp-{os.getpid()}"
    left.mkdir()
    (left / "config.json").write_text("{}")
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.code == 0
    assert (tmp_path / "output" / "report.json").is_file()

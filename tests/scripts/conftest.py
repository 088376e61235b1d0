"""A tiny checkpoint with its texts, and runs of compress_llm.py, refused ones among them.

A mistake is refused as early as it can be known. "Early" is made visible by replacing what must
not be reached by functions that fail the test.
"""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hf_lowrank
from tests.scripts import (
    EncoderFiles,
    InProcess,
    Inputs,
    Refusal,
    leftovers,
    lines,
    make_inputs,
    must_not_happen,
    save_encoder,
)


@pytest.fixture(scope="package")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Files that no test changes."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def broken(inputs: Inputs, tmp_path: Path) -> Path:
    """A copy of the model for a test to damage."""
    return Path(shutil.copytree(inputs.model, tmp_path / "model"))


@pytest.fixture
def compress_llm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess("compress_llm", monkeypatch, capsys)


@pytest.fixture
def refused(compress_llm: InProcess, inputs: Inputs, tmp_path: Path) -> Refusal:
    """The sentence of a refused run, after a look at what it left on the disk."""

    def run(*arguments: object, **changes: object) -> str:
        settings = {"param_ratio": 0.6, "output_dir": tmp_path / "output"} | changes
        done = compress_llm(*inputs.arguments(**settings), *arguments)
        error = done.error
        assert not (tmp_path / "output").exists()
        assert leftovers(tmp_path) == []
        return error

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model is loaded."""
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", must_not_happen("the model was loaded")
    )


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when long work begins."""
    for name in ("collect_moments", "decompose"):
        monkeypatch.setattr(
            hf_lowrank.compression.analysis, name, must_not_happen(f"{name} was called")
        )
    monkeypatch.setattr(
        hf_lowrank.compression.application,
        "measure_loss",
        must_not_happen("measure_loss was called"),
    )


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> EncoderFiles:
    folder = tmp_path_factory.mktemp("encoder")
    found = EncoderFiles(
        save_encoder(folder / "model"), *(folder / name for name in ("c.txt", "e.txt", "sts.tsv"))
    )
    found.calibration.write_text("\n".join(lines(96, 0)), encoding="utf-8")
    found.evaluation.write_text("\n".join(lines(32, 1)), encoding="utf-8")
    rows = ["index\tsentence1\tsentence2\tscore"]
    rows += [
        f"{i}\t{a}\t{b}\t{i % 5}.5"
        for i, (a, b) in enumerate(zip(lines(20, 2), lines(20, 3), strict=True))
    ]
    found.pairs.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return found


@pytest.fixture
def compress_encoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> InProcess:
    return InProcess("compress_encoder", monkeypatch, capsys)

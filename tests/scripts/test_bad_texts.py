"""Texts that compress_llm.py refuses: not there, not readable, of another format or too short."""

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.scripts import Inputs, Refusal


def bad_text(kind: str, folder: Path) -> tuple[Path, str]:
    """A source that can't be used, and what must be said about it."""
    folder.mkdir(exist_ok=True)
    contents = {
        "empty.txt": (b"", "holds no text; give another one."),
        "blank.txt": (b" \n\t\n", "holds no text; give another one."),
        "binary.txt": (bytes(range(256)), "is not UTF-8 text; convert it first."),
        "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not a JSON object; mend it."),
        "columns.jsonl": (b'{"body": "a"}\n', "line 1 has no text column"),
        "number.jsonl": (b'{"text": 3}\n', "line 1 has no text column"),
        "list.jsonl": (b"[1, 2]\n", "line 1 has no text column"),
        "empty.jsonl": (b"", "holds no text; give another one."),
        "junk.parquet": (b"junk", "is not a readable parquet file"),
        "empty.parquet": (b"", "is not a readable parquet file"),
    }
    path = folder / kind
    if kind in contents:
        path.write_bytes(contents[kind][0])
        return path, contents[kind][1]
    if kind == "folder":
        path.mkdir()
        return path, "is a folder, not a text file; name a file in it."
    if kind == "columns.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
        return path, "row 1 has no text column"
    return path, "no such file; correct the path."


BAD_TEXTS = [
    "missing.txt",
    "missing.jsonl",
    "folder",
    "empty.txt",
    "blank.txt",
    "binary.txt",
    "broken.jsonl",
    "columns.jsonl",
    "number.jsonl",
    "list.jsonl",
    "empty.jsonl",
    "junk.parquet",
    "empty.parquet",
    "columns.parquet",
]


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_text(refused: Refusal, tmp_path: Path, kind: str, role: str):
    path, sentence = bad_text(kind, tmp_path / "texts")
    error = refused(**{role: path})
    assert error.startswith(f"{path}: {sentence}")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
@pytest.mark.parametrize("kind", ["missing.txt", "folder", "empty.txt", "broken.jsonl"])
def test_a_bad_text_is_refused_before_the_model_is_loaded(
    refused: Refusal, tmp_path: Path, kind: str, role: str
):
    path, sentence = bad_text(kind, tmp_path / "texts")
    assert refused(**{role: path}).startswith(f"{path}: {sentence}")


@pytest.mark.usefixtures("no_calibration")
def test_a_dataset_that_the_hub_does_not_have(refused: Refusal):
    error = refused(calibration="nobody/no-such-dataset")
    assert error.startswith("nobody/no-such-dataset: no such file, and the Hub has no such dataset")
    assert error.endswith("offline, use a local .txt, .jsonl or .parquet file, or 'demo'.")


@pytest.mark.usefixtures("no_calibration")
def test_the_default_text_where_the_hub_cannot_be_reached(refused: Refusal):
    error = refused(calibration=None)
    assert error.startswith("Salesforce/wikitext:wikitext-2-raw-v1: no such file")
    assert error.endswith("offline, use a local .txt, .jsonl or .parquet file, or 'demo'.")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_text_without_permission(refused: Refusal, tmp_path: Path):
    path = tmp_path / "secret.txt"
    path.write_text("w01 " * 2000)
    path.chmod(0)
    assert refused(calibration=path) == f"{path}: cannot be read (Permission denied)."


@pytest.mark.usefixtures("no_calibration")
def test_a_text_that_the_system_will_not_read(
    refused: Refusal, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
):
    read_text = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == inputs.calibration:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert refused() == f"{inputs.calibration}: cannot be read (Input/output error)."


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_too_little_text(refused: Refusal, inputs: Inputs, role: str):
    error = refused(**{f"{role}_sequences": 65})
    assert error == (
        f"{getattr(inputs, role)}: 2048 tokens are there for {role}, but 65 sequences of 32 need "
        "2080; ask for fewer or shorter sequences, or give more text."
    )


@pytest.mark.usefixtures("no_calibration")
def test_too_little_text_for_a_tolerance_counts_its_own_share(refused: Refusal):
    settings = {"param_ratio": None, "loss_tolerance": 0.1}
    assert "1536 tokens are there for calibration" in refused(calibration_sequences=49, **settings)
    assert "512 tokens are there for held_out" in refused(held_out_sequences=17, **settings)

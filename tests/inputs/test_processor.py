"""A processor's files, from a folder and from the Hub's cache; none where there can't be any."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.processor import FILES, processor_files

COMMIT = "0123456789" * 4


def test_the_files_of_a_folder_are_read_and_nothing_else(tmp_path: Path):
    for name in (*FILES[1:], "config.json", "tokenizer.json"):
        (tmp_path / name).write_text(f"{{}} {name}", "utf-8")
    found = processor_files(str(tmp_path))
    assert found == {name: f"{{}} {name}".encode() for name in FILES[1:]}


@pytest.mark.parametrize("source", ["demo", "model.gguf"])
def test_a_file_or_the_demo_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / FILES[0]).touch()
    assert processor_files(source) == {}


def test_a_model_of_the_hub_has_those_of_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--ada--seeing"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "preprocessor_config.json").write_bytes(b'{"size": 224}')
    assert processor_files("ada/seeing") == {"preprocessor_config.json": b'{"size": 224}'}
    with pytest.raises(DataError, match=r"^ada/blind: no such folder, and the Hub has no such"):
        processor_files("ada/blind")

"""The comparison of exported models, in torch, which needs no export."""

import json

import pytest

from benchmarks.export_speed import ExportSpeedArguments, compare_exports
from hf_lowrank.errors import ConfigError
from tests.scripts import save_checkpoint
from tests.tiny_models import tiny_llama


def test_models_are_timed_in_each_cell(tmp_path, capsys):
    model = tiny_llama(max_position_embeddings=320)
    folders = [str(save_checkpoint(tmp_path / name, model)) for name in ("dense", "small")]
    output = tmp_path / "out.json"
    compare_exports(ExportSpeedArguments("torch", folders, rounds=1, output=str(output)))
    rows = json.loads(output.read_text())["rows"]
    assert [(row["cell"], row["model"]) for row in rows] == [
        (cell, name) for cell in ("prefill 1 x 256", "decode 1") for name in ("dense", "small")
    ]
    assert all(len(row["cpu_seconds"]) == 1 and row["cpu_seconds"][0] > 0 for row in rows)
    assert "| decode 1 | small |" in capsys.readouterr().out


def test_an_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match=r"engine must be one of openvino, onnx, torch; got 'x'"):
        compare_exports(ExportSpeedArguments("x", ["a", "b"]))


def test_one_model_is_too_few():
    with pytest.raises(ConfigError, match="models must name a dense model's folder"):
        compare_exports(ExportSpeedArguments("torch", ["a"]))

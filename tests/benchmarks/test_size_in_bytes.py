"""`benchmark.py bytes` on a tiny model: every way is within the size."""

import json

import pytest

from benchmarks.size_in_bytes import SizeInBytesArguments, compare_types
from tests.scripts import make_inputs

pytest.importorskip("torchao.quantization")


def test_every_way_is_within_the_size_and_measured(tmp_path, capsys):
    inputs = make_inputs(tmp_path)
    args = SizeInBytesArguments(
        model=str(inputs.model),
        megabytes=[0.04],
        calibration=[str(inputs.calibration)],
        calibration_sequences=8,
        held_out_sequences=4,
        evaluation=[str(inputs.evaluation)],
        evaluation_sequences=8,
        sequence_length=32,
        output_dir=str(tmp_path / "rows"),
    )
    compare_types(args)
    paths = (tmp_path / "rows").iterdir()
    rows = {row["way"]: row for row in (json.loads(path.read_text("utf-8")) for path in paths)}
    assert set(rows) == {"mixed", "int8", "int4"}
    for row in rows.values():
        assert row["bytes"] <= 40_000
        assert set(row["texts"]) == {"held out", "evaluation.txt"}
    assert set(rows["mixed"]["bits"]) <= {"4", "8"}
    assert "| 0.04 | factors | mixed (" in capsys.readouterr().out

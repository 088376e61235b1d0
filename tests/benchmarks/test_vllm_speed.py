"""The comparison in vLLM, with workers that only pretend to compute."""

import json
import sys

import pytest

from benchmarks import vllm_speed
from benchmarks.vllm_speed import CELLS, VllmSpeedArguments, compare_in_vllm
from hf_lowrank.errors import ConfigError, DataError

# The compressed model takes half of the time; the first round takes far longer.
PRETEND = """
import json, sys
rounds = {}
for line in sys.stdin:
    asked = json.loads(line)
    key = str(asked)
    rounds[key] = rounds.get(key, 0) + 1
    seconds = (100 if rounds[key] == 1 else asked["new"]) / (2 if "small" in sys.argv[1] else 1)
    print(json.dumps({"cpu_seconds": seconds, "seconds": 0}), flush=True)
"""


def test_models_take_turns_and_the_first_round_only_warms_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vllm_speed, "WORKER", (sys.executable, "-c", PRETEND))
    output = tmp_path / "out.json"
    compare_in_vllm(VllmSpeedArguments(["dense", "small"], rounds=3, output=str(output)))
    rows = json.loads(output.read_text())["rows"]
    assert [(row["cell"], row["model"]) for row in rows] == [
        (cell, model) for cell in CELLS for model in ("dense", "small")
    ]
    assert {row["speedup_median"] for row in rows if row["model"] == "small"} == {2.0}
    assert {row["speedup_best"] for row in rows if row["model"] == "dense"} == {1.0}
    assert rows[-1]["cpu_seconds"] == [16.0] * 3
    assert "| decode 16 | small | 16.000 | 2.00 / 2.00 |" in capsys.readouterr().out


def test_one_model_is_too_few():
    with pytest.raises(ConfigError, match=r"models must name a dense model's folder and then"):
        compare_in_vllm(VllmSpeedArguments(["dense"]))


def test_an_engine_that_ends_is_named(monkeypatch):
    monkeypatch.setattr(vllm_speed, "WORKER", (sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(DataError, match=r"^dense: vLLM has ended; its last lines say why\.$"):
        compare_in_vllm(VllmSpeedArguments(["dense", "small"]))

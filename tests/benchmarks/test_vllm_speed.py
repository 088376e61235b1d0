"""The comparison in vLLM, with workers that only pretend to compute."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import vllm_speed
from benchmarks.streaming import StreamingArguments
from benchmarks.vllm_speed import (
    CELLS,
    WAYS,
    VllmSpeedArguments,
    compare_in_vllm,
    make_models,
)
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


def test_random_models_are_made_with_the_sizes_asked_for(monkeypatch, tmp_path):
    small = partial(StreamingArguments, hidden_size=32, intermediate_size=48, heads=8)
    monkeypatch.setattr(vllm_speed, "StreamingArguments", partial(small, vocabulary=440))
    args = VllmSpeedArguments(random_layers=1, param_ratio=[0.5])
    folders = make_models(tmp_path, args)
    assert [Path(folder).name for folder in folders] == ["dense", *(f"{way}-0.5" for way in WAYS)]
    dense, *cuts = map(AutoModelForCausalLM.from_pretrained, folders)
    assert dense.config.vocab_size == 20
    targeted = sum(p.numel() for p in dense.model.layers.parameters() if p.ndim == 2)
    for model in cuts:
        lost = dense.num_parameters() - model.num_parameters()
        assert 0.5 <= lost / targeted < 0.56


def test_models_are_made_or_named_not_both():
    with pytest.raises(ConfigError, match=r"random_layers goes without models, and ways are "):
        compare_in_vllm(VllmSpeedArguments(["dense", "small"], random_layers=1))


def test_one_model_is_too_few():
    with pytest.raises(ConfigError, match=r"models must name a dense model's folder and then"):
        compare_in_vllm(VllmSpeedArguments(["dense"]))


def test_an_engine_that_ends_is_named(monkeypatch):
    monkeypatch.setattr(vllm_speed, "WORKER", (sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(DataError, match=r"^dense: vLLM has ended; its last lines say why\.$"):
        compare_in_vllm(VllmSpeedArguments(["dense", "small"]))

"""The measurement of recovery: figures of all texts, and a model that is dense again."""

import math

import pytest
import torch

from hf_lowrank import LowRankConfig
from hf_lowrank.benchmarks.recovery import measure_recovery
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.recovery import RecoverySettings
from tests.tiny_models import tiny_llama, written_batches


@pytest.mark.parametrize("config", [None, LowRankConfig(channels=True, measured_prices=True)])
def test_every_text_is_measured_dense_cut_and_recovered(config, capsys):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = written_batches(model, 8, seed=1), written_batches(model, 4, seed=2)
    evaluations = {"near": written_batches(model, 4, seed=3), "far": written_batches(model, 2)}
    settings = RecoverySettings(steps=30, learning_rate=1e-3)
    found = measure_recovery(model, [0.6, 0.3], settings, texts, evaluations, config)
    assert found["dense"]["near"] == measure_loss(model, evaluations["near"]).perplexity
    assert [row["param_ratio"] for row in found["rows"]] == [0.6, 0.3]
    for row in found["rows"]:
        assert set(row["cut"]) == set(row["recovered"]) == {"near", "far"}
        assert row["recovery"]["accepted"] == (
            row["recovery"]["loss_after"] < row["recovery"]["loss_before"]
        )
        assert row["seconds"] > 0
        rises = [math.log(row[key]["far"] / found["dense"]["far"]) for key in ("recovered", "cut")]
        assert row["rise_left"]["far"] == pytest.approx(rises[0] / rises[1])
    assert found["rows"][1]["cut"]["near"] > found["dense"]["near"]
    printed = capsys.readouterr().out
    assert "of the rise left)" in printed or "below the dense model)" in printed
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())

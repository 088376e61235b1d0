"""The measurement of recovery: figures of all texts, and a model that is dense again."""

import copy
import math

import pytest
import torch

from benchmarks.recovery import format_row, measure_recovery
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression.recovery import RecoverySettings
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.perplexity import measure_loss
from tests.tiny_models import tiny_llama, written_batches


def cut_by_price(model, calibration, param_ratio, batches):
    """Perplexity after a cut by `compress` with the defaults at a size."""
    model = copy.deepcopy(model)
    compress(model, LowRankConfig(param_ratio=param_ratio), calibration, progress=False)
    return pytest.approx(measure_loss(model, batches).perplexity, rel=1e-5)


BEST = LowRankConfig(channels=True, measured_prices=True)


@pytest.mark.parametrize(("config", "stages"), [(None, 1), (BEST, 1), (BEST, 2)])
def test_every_text_is_measured_dense_cut_and_recovered(config, stages, capsys):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = written_batches(model, 8, seed=1), written_batches(model, 4, seed=2)
    evaluations = {"near": written_batches(model, 4, seed=3), "far": written_batches(model, 2)}
    settings = RecoverySettings(steps=12, learning_rate=1e-3)
    found = measure_recovery(model, [0.6, 0.3], settings, texts, evaluations, config, stages)
    assert found["dense"]["near"] == measure_loss(model, evaluations["near"]).perplexity
    assert [row["param_ratio"] for row in found["rows"]] == [0.6, 0.3]
    for row in found["rows"]:
        assert set(row["cut"]) == set(row["recovered"]) == {"near", "far"}
        assert row["recovery"]["accepted"] == (
            row["recovery"]["loss_after"] < row["recovery"]["loss_before"]
        )
        assert 0 < row["seconds"] < row["total_seconds"]
        assert [each["steps"] for each in row["stages"]] == [4] * (stages - 1)
        assert row["recovery"]["steps"] == (12 if stages == 1 else 8)
        rises = [math.log(row[key]["far"] / found["dense"]["far"]) for key in ("recovered", "cut")]
        assert row["rise_left"]["far"] == pytest.approx(rises[0] / rises[1])
        assert ("price_alone" in row) == ("of_price_alone" in row) == (config is not None)
        if config is not None:
            alone = row["price_alone"]["far"]
            assert alone == cut_by_price(model, texts[0], row["param_ratio"], evaluations["far"])
            share = rises[0] / math.log(alone / found["dense"]["far"])
            assert row["of_price_alone"]["far"] == pytest.approx(share)
    assert found["rows"][1]["cut"]["near"] > found["dense"]["near"]
    printed = capsys.readouterr().out
    assert "of the rise left)" in printed or "below the dense model)" in printed
    assert ("that of kfac with price alone: near" in printed) == (config is not None)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_stages_end_in_the_model_that_compress_makes(capsys):
    model = tiny_llama()
    texts = written_batches(model, 8, seed=1), written_batches(model, 4, seed=2)
    evaluation = written_batches(model, 4, seed=3)
    settings = RecoverySettings(steps=6)
    found = measure_recovery(model, [0.5], settings, texts, {"it": evaluation}, BEST, stages=2)
    options = {"recover_steps": 6, "stages": 2, "progress": False}
    compress(model, BEST.replace(param_ratio=0.5), texts[0], held_out=texts[1], **options)
    assert found["rows"][0]["recovered"]["it"] == measure_loss(model, evaluation).perplexity


def test_a_cut_without_a_rise_has_no_share_of_it_left():
    row = {"param_ratio": 0.9, "cut": {"it": 9.0}, "recovered": {"it": 8.0}}
    row |= {"rise_left": {"it": math.nan}, "seconds": 60.0, "total_seconds": 90.0}
    sentence = "the cut model is no worse than the dense one"
    assert format_row(row) == f"0.9: it 9 -> 8 ({sentence}), 1.0 minutes, 1.5 with the cut"


def test_too_few_steps_for_the_stages_are_refused_before_any_work():
    with pytest.raises(ConfigError, match="set recover_steps to at least 5"):
        measure_recovery(tiny_llama(), [0.5], RecoverySettings(4), ([], []), {}, stages=4)

"""`sweep`: each size as in a run of its own, and the dense model back afterwards."""

import pytest

from hf_lowrank import LowRankConfig, compress, sweep
from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring.losses import item_losses
from tests.compression import CountingLoss, is_dense
from tests.tiny_models import equal_states, snapshot, tiny_llama


def test_sweep_gives_what_single_runs_give(text):
    model, ratios = tiny_llama(), [0.4, 0.8]
    config = LowRankConfig(loss_tolerance=0.1)
    for report, ratio in zip(
        sweep(model, config, ratios, text[:4], text[8:9], progress=False), ratios, strict=True
    ):
        single = tiny_llama()
        expected = compress(
            single, LowRankConfig(param_ratio=ratio), text[:4], text[8:9], progress=False
        )
        assert report.ranks == expected.ranks
        assert report.config == expected.config
        assert report.evaluation == expected.evaluation
        assert equal_states(snapshot(model), snapshot(single))


def test_sweep_restores_the_dense_model_between_and_after(text):
    model = tiny_llama()
    before, modules = snapshot(model), dict(model.named_modules())
    seen = []

    def loss_function(model, batch):
        seen.append(is_dense(model))
        return item_losses(model, batch)

    for _ in sweep(
        model,
        LowRankConfig(),
        [0.3, 0.6],
        text[:2],
        text[8:9],
        loss_function=loss_function,
        progress=False,
    ):
        assert not is_dense(model)
        assert model.config.quantization_config.ranks
    # The first batch dry, two calibration batches and one evaluation on the dense model, then one
    # at each size.
    assert seen == [True, True, True, True, False, False]
    assert equal_states(snapshot(model), before)
    assert dict(model.named_modules()) == modules
    assert not hasattr(model.config, "quantization_config")
    assert "save_pretrained" not in vars(model)


def test_sweep_restores_the_model_when_its_consumer_raises(text):
    model = tiny_llama()
    before = snapshot(model)

    def consume():
        for _ in sweep(model, LowRankConfig(metric="plain"), [0.5, 0.7], progress=False):
            raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    assert equal_states(snapshot(model), before)
    assert not hasattr(model.config, "quantization_config")


def test_sweep_restores_the_model_when_the_evaluation_fails(text):
    model = tiny_llama()
    before = snapshot(model)
    # Two calibration batches, one dense evaluation; the fourth call is on the compressed model.
    runs = sweep(
        model,
        LowRankConfig(),
        [0.5],
        text[:2],
        text[8:9],
        loss_function=CountingLoss(4),
        progress=False,
    )
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        next(runs)
    assert equal_states(snapshot(model), before)
    assert not hasattr(model.config, "quantization_config")


def test_sweep_can_be_left_early(text):
    model = tiny_llama()
    runs = sweep(model, LowRankConfig(metric="plain"), [0.5, 0.7], progress=False)
    next(runs)
    assert not is_dense(model)
    runs.close()
    assert is_dense(model)


def test_sweep_checks_every_ratio_before_it_starts():
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"must lie in \(0, 1\], got 1\.5"):
        next(sweep(model, LowRankConfig(metric="plain"), [0.5, 1.5], progress=False))
    assert is_dense(model)


def test_sweep_over_no_ratio_gives_no_report():
    assert list(sweep(tiny_llama(), LowRankConfig(metric="plain"), [], progress=False)) == []

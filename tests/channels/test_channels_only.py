"""Runs that take out channels and factorize nothing."""

import pytest

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression import analysis
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.rebuild import factorized_layers, narrowed_layers
from tests.tiny_models import tiny_llama, written_batches


@pytest.fixture(scope="module")
def text():
    return written_batches(tiny_llama(), num_batches=6)


@pytest.mark.parametrize("measured_prices", [False, True])
def test_the_size_is_reached_by_channels_alone(text, measured_prices):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.7, channels_only=True, measured_prices=measured_prices)
    report = compress(model, config, text, progress=False)
    assert narrowed_layers(model)
    assert not factorized_layers(model)
    # Nothing but the next step of some feed-forward could take what is left of the budget.
    assert 0.6 < report.parameters.targeted_kept / report.parameters.targeted_dense <= 0.7


@pytest.mark.default_recipe
def test_a_tolerance_is_met_by_channels_alone(text):
    model = tiny_llama()
    config = LowRankConfig(loss_tolerance=0.5, channels_only=True)
    report = compress(model, config, text, progress=False)
    assert narrowed_layers(model)
    assert not factorized_layers(model)
    # Smaller than any plan of ranks at their break-even, so the search went below 1.
    assert report.parameters.targeted_kept < 0.95 * report.parameters.targeted_dense


def test_a_size_that_channels_cannot_reach_is_refused_before_any_long_work(text, monkeypatch):
    monkeypatch.setattr(analysis, "collect_moments", None)
    # Of a block's 9216 weights 6144 are in its feed-forward, and 2 of 64 channels have to stay.
    with pytest.raises(ConfigError, match=r"0\.3 can't be reached by channels alone.*least 0\.354"):
        compress(tiny_llama(), LowRankConfig(param_ratio=0.3, channels_only=True), text)


@pytest.mark.parametrize(
    "other", [{"channels": False}, {"min_rank": 2}, {"rank_pattern": {"q_proj": 3}}]
)
def test_what_speaks_of_ranks_is_refused(other):
    with pytest.raises(ConfigError, match="gives no layer a rank; leave out channels"):
        LowRankConfig(param_ratio=0.5, channels_only=True, **other)


@pytest.mark.parametrize("goal", [{"rank": 4}, {"megabytes": 1}])
def test_other_goals_are_refused(goal):
    with pytest.raises(ConfigError, match="read with goal param_ratio or loss_tolerance"):
        LowRankConfig(channels_only=True, **goal)


def test_the_setting_is_in_the_record_only_where_it_is_set():
    assert "channels_only" not in LowRankConfig(param_ratio=0.5).to_dict()
    record = LowRankConfig(param_ratio=0.5, channels_only=True, ranks={}).to_dict()
    assert LowRankConfig.from_dict(record).channels_only

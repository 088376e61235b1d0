"""What is refused, layers that fail, and what a run leaves behind."""

import pytest
import torch
from torch import nn

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.errors import ConfigError, DataError, NumericalError
from tests.compression import NAN_LAYER, CountingLoss, is_dense, model_with_nan, num_hooks
from tests.tiny_models import (
    batches_for,
    equal_states,
    snapshot,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    token_batches,
)

# Refusals


def test_a_metric_without_its_data_is_refused():
    model = tiny_llama()
    with pytest.raises(DataError, match=r"metric 'kfac' needs calibration data; .* 'plain'"):
        compress(model, LowRankConfig(param_ratio=0.5), progress=False)
    assert is_dense(model)


@pytest.mark.parametrize("batches", [None, token_batches(1)])
def test_a_tolerance_without_held_out_text_is_refused(batches):
    with pytest.raises(DataError, match="at least two calibration batches, or held_out"):
        compress(tiny_llama(), LowRankConfig(), batches, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recover_steps": -5}, "recover_steps must be an integer >= 0, got -5"),
        ({"moment_gib": -1}, "moment_gib must be a number >= 0, got -1"),
    ],
)
def test_options_that_no_run_could_follow_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compress(tiny_llama(), LowRankConfig(param_ratio=0.5), token_batches(1), **settings)


def test_an_empty_held_out_text_is_refused():
    with pytest.raises(DataError, match="holds nothing to score"):
        compress(tiny_llama(), LowRankConfig(metric="plain"), held_out=[], progress=False)


def test_a_budget_below_the_smallest_ranks_is_refused_with_numbers():
    config = LowRankConfig(param_ratio=0.2, metric="plain", min_rank=8)
    with pytest.raises(ConfigError, match=r"0\.2 allows \d+ parameters, but .*min_rank 8.* need"):
        compress(tiny_llama(), config, progress=False)


def test_classifier_without_labels_is_refused():
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in token_batches(2)]
    with pytest.raises(DataError, match="no 'labels', which BertForSequenceClassification needs"):
        compress(tiny_bert_classifier(), LowRankConfig(param_ratio=0.5), batches, progress=False)


def test_labels_drawn_from_the_model_need_none_in_the_data():
    config = LowRankConfig(param_ratio=0.5, label_source="model")
    assert compress(tiny_bert_classifier(), config, token_batches(2), progress=False).ranks


# Failures of single layers


def test_a_layer_with_nan_stays_dense_and_is_named():
    model = model_with_nan()
    report = compress(model, LowRankConfig(param_ratio=0.7, metric="plain"), progress=False)
    assert report.failures == {NAN_LAYER: "the weight holds NaN or infinity"}
    assert report.ranks[NAN_LAYER] is None
    assert isinstance(model.get_submodule(NAN_LAYER), nn.Linear)
    assert sum(rank is not None for rank in report.ranks.values()) == 13
    assert report.parameters.targeted_kept <= 0.7 * report.parameters.targeted_dense


def test_a_model_whose_loss_is_nan_is_refused_untouched(text):
    model = model_with_nan()
    with pytest.raises(NumericalError, match="calibration loss is nan"):
        compress(model, LowRankConfig(param_ratio=0.7), text[:2], progress=False)
    assert is_dense(model)
    assert num_hooks(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


# What is left behind


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mixtral])
def test_hooks_flags_and_modes_are_as_before(build):
    model = build().train()
    frozen = next(model.parameters()).requires_grad_(False)
    compress(model, LowRankConfig(param_ratio=0.6), batches_for(model), progress=False)
    assert num_hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_exception_halfway_leaves_the_dense_model_without_hooks(text):
    model = tiny_llama().train()
    before = snapshot(model)
    config = LowRankConfig(param_ratio=0.6)
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        compress(model, config, text[:4], loss_function=CountingLoss(2), progress=False)
    assert num_hooks(model) == 0
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert equal_states(snapshot(model), before)


def test_the_user_s_own_hooks_survive(text):
    model, seen = tiny_llama(), []
    model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    compress(model, LowRankConfig(param_ratio=0.6), text[:2], progress=False)
    assert num_hooks(model) == 1
    assert seen


def test_random_state_is_left_alone(text):
    config = LowRankConfig(param_ratio=0.6, label_source="model")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compress(tiny_llama(), config, text[:2], progress=False)
    assert torch.equal(torch.rand(3), expected)

"""Compressing a dense checkpoint while it is loaded."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_lowrank
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.errors import ConfigError, TargetError
from tests.format import load_clean, same_tensors
from tests.tiny_models import num_lowrank, tiny_bert_classifier, tiny_llama

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("goal", [{"param_ratio": 0.8}, {"rank": 5}])
def test_compressing_while_loading_equals_compress(dense_folder, goal, tmp_path):
    config = LowRankConfig(metric="plain", **goal)
    model = load_clean(AutoModelForCausalLM, dense_folder, quantization_config=config)
    expected = tiny_llama()
    report = compress(expected, config, progress=False)
    assert num_lowrank(model) > 0
    assert same_tensors(model, expected)
    assert model.config.quantization_config.ranks == report.ranks
    model.save_pretrained(tmp_path)
    assert same_tensors(hf_lowrank.load(tmp_path), model)


def test_compressing_while_loading_stores_the_form_that_is_asked_for(dense_folder, tmp_path):
    config = LowRankConfig(rank=5, metric="plain", form="compact")
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    loaded = hf_lowrank.load(tmp_path)
    assert loaded.config.quantization_config.form == "compact"
    assert same_tensors(loaded, model)


@pytest.mark.parametrize("goal", [{"param_ratio": 0.8}, {}, {"rule": "energy"}])
def test_compressing_while_loading_replays_given_ranks(dense_folder, goal):
    ranks = {f"model.layers.{index}.self_attn.q_proj": rank for index, rank in ((0, 3), (1, None))}
    config = LowRankConfig(metric="plain", target_modules=["q_proj"], ranks=ranks, **goal)
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)
    expected = tiny_llama()
    compress(expected, config, progress=False)
    assert num_lowrank(model) == 1
    assert model.config.quantization_config.ranks == ranks
    assert same_tensors(model, expected)


@pytest.mark.parametrize("metric", ["plain", "sparsity"])  # those that need no data
def test_compressing_while_loading_respects_the_budget(dense_folder, metric):
    names = [n for n, m in tiny_llama().model.layers.named_modules() if isinstance(m, nn.Linear)]
    dense = sum(tiny_llama().model.layers.get_submodule(n).weight.numel() for n in names)
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, quantization_config=LowRankConfig(param_ratio=0.8, metric=metric)
    )
    layers = model.model.layers
    kept = sum(p.numel() for n in names for p in layers.get_submodule(n).parameters())
    assert 0.75 * dense < kept <= 0.8 * dense


def test_compressing_while_loading_with_other_keywords(dense_folder):
    config = LowRankConfig(param_ratio=0.8, metric="plain")
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, quantization_config=config, dtype=torch.bfloat16, device_map="auto"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert num_lowrank(model) > 0


def test_compressing_while_loading_keeps_the_classification_head(tmp_path):
    dense = tiny_bert_classifier()
    dense.save_pretrained(tmp_path)
    config = LowRankConfig(param_ratio=0.8, metric="plain")
    model = load_clean(AutoModelForSequenceClassification, tmp_path, quantization_config=config)
    assert num_lowrank(model) == 12
    assert torch.equal(model.classifier.weight, dense.classifier.weight)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"param_ratio": 0.8}, ConfigError, "no calibration data, which metric 'kfac' needs"),
        ({"rank": 4, "metric": "whitened"}, ConfigError, "which metric 'whitened' needs"),
        ({"metric": "plain"}, ConfigError, "can't measure a loss; give .* a param_ratio or a rank"),
        ({"metric": "plain", "loss_tolerance": 0.1}, ConfigError, "can't measure a loss"),
        (
            {"metric": "plain", "rank": 4, "narrowed": {"model.layers.0.mlp.up_proj": [3, 32]}},
            ConfigError,
            "no calibration data, which narrowed layers need",
        ),
        (
            {"metric": "plain", "ranks": {"model.layers.0.self_attn.q_proj": 3}},
            ConfigError,
            "Ranks and layers do not match: model.layers.0.mlp.down_proj",
        ),
        ({"metric": "plain", "rank": 20}, ConfigError, r"k_proj: rank 20 exceeds min\(16, 32\)"),
        (
            {"metric": "plain", "rank": 4, "target_modules": ["c_attn"]},
            TargetError,
            "target_modules: 'c_attn' matches no linear layer",
        ),
    ],
)
def test_compressing_while_loading_refuses_what_it_cannot_do(
    dense_folder, settings, error, message
):
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(
            dense_folder, quantization_config=LowRankConfig(**settings)
        )


def test_a_compressed_checkpoint_is_not_compressed_again_while_loading(llama):
    config = LowRankConfig(param_ratio=0.3, metric="plain")
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=config)
    assert same_tensors(model, llama.model)

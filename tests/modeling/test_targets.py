"""Which layers are targets, and how patterns name them."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.modeling.targets import find_targets, fixed_ranks, match_name, untouched_weights
from tests.tiny_models import tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_mixtral


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("model.layers.1.mlp.up_proj", "up_proj"),
        ("model.layers.1.mlp.up_proj", "mlp.up_proj"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.*"),
        ("model.layers.1.mlp.up_proj", "layers.1.*"),
        ("model.layers.1.mlp.up_proj", "*.mlp.*"),
        ("model.layers.1.mlp.up_proj", "up_pro?"),
        ("encoder.layer.1", "layer.1"),
        ("layer.1", "layer.1"),
    ],
)
def test_pattern_matches(name, pattern):
    assert match_name(name, pattern)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("encoder.layer.11", "layer.1"),
        ("encoder.layer.1.dense", "layer.1"),
        ("encoder.sublayer.1", "layer.1"),
        ("model.layers.11.mlp.up_proj", "layers.1.*"),
        ("model.layers.1.mlp.up_proj", "proj"),
        ("model.layers.1.mlp.up_proj", "UP_PROJ"),
        ("model.sublayers.1.mlp.up_proj", "layers.1.*"),
    ],
)
def test_pattern_does_not_match(name, pattern):
    assert not match_name(name, pattern)


def names(model, **settings):
    return list(find_targets(model, LowRankConfig(**settings)))


def test_layer_1_is_not_layer_11():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(12))})
    assert names(model, target_modules=["layers.1"]) == ["layers.1"]


def test_targets_come_in_the_order_of_the_model():
    model = tiny_llama()
    found = names(model, target_modules=["up_proj", "q_proj"])
    assert found == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_targets_are_the_layers_themselves():
    model = tiny_gpt2()
    for name, layer in find_targets(model, LowRankConfig()).items():
        assert model.get_submodule(name) is layer


def test_wildcards_and_exclusions_combine():
    found = names(
        tiny_llama(), target_modules=["model.layers.1.*"], exclude_modules=["self_attn.*"]
    )
    assert found == [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]


def test_exclusions_apply_to_the_default_targets():
    excluded = names(tiny_llama(), exclude_modules="k_proj")
    assert set(names(tiny_llama())) - set(excluded) == {
        f"model.layers.{index}.self_attn.k_proj" for index in (0, 1)
    }


def test_the_head_is_never_a_target():
    model = tiny_llama(tie_word_embeddings=False)
    assert "lm_head" not in names(model)
    with pytest.raises(TargetError, match="lm_head: is the output head"):
        names(model, target_modules=["lm_head"])


def test_a_pattern_may_cover_an_excluded_head():
    model = tiny_llama()
    assert names(model, target_modules=["*"], exclude_modules=["lm_head"]) == names(model)


def test_layers_too_narrow_to_gain_are_left_out():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 1)])})
    assert names(model) == ["layers.0"]


@pytest.mark.parametrize("router", ["gate", "router", "shared_expert_gate", "wg"])
def test_routers_are_left_out_unless_named(router):
    block = nn.ModuleDict({router: nn.Linear(8, 4), "proj": nn.Linear(8, 8)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert names(model) == ["layers.0.proj"]
    assert names(model, target_modules=[router]) == [f"layers.0.{router}"]


def test_a_model_without_blocks_offers_all_linear_layers_but_the_last():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 4))
    assert names(model) == ["0", "2"]


def test_layers_outside_the_blocks_are_no_targets():
    found = names(tiny_bert_classifier())
    assert found
    assert all(name.startswith("bert.encoder.layer.") for name in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["query"]},
            "target_modules: 'query' matches no linear layer; .*q_proj",
        ),
        ({"target_modules": ["norm"]}, "target_modules: 'norm' matches no linear layer"),
        ({"exclude_modules": ["layers.2.*"]}, r"exclude_modules: 'layers\.2\.\*' matches no"),
        (
            {"target_modules": ["up_proj"], "rank": 2, "rank_pattern": {"q_proj": 3}},
            "rank_pattern: 'q_proj' matches no linear layer; .*: up_proj",
        ),
    ],
)
def test_a_pattern_without_a_match_names_its_setting(settings, message):
    with pytest.raises(TargetError, match=message):
        find_targets(tiny_llama(), LowRankConfig(**settings))


def test_excluding_everything_is_refused():
    with pytest.raises(TargetError, match="No linear layer of GPT2LMHeadModel is left"):
        find_targets(tiny_gpt2(), LowRankConfig(exclude_modules=["transformer.h.*"]))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(TargetError, match=r"No linear layer of Sequential .* for example: none"):
        find_targets(nn.Sequential(nn.ReLU()), LowRankConfig())


def test_a_compressed_model_is_refused():
    model = tiny_llama()
    compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    with pytest.raises(TargetError, match="already compressed; merge it first"):
        find_targets(model, LowRankConfig())


@pytest.mark.parametrize("settings", [{"rank": 17}, {"rank_pattern": {"k_proj": 17}}])
def test_a_rank_above_the_limit_names_the_layer(settings):
    message = r"model\.layers\.0\.self_attn\.k_proj: rank 17 exceeds min\(16, 32\)"
    with pytest.raises(ConfigError, match=message):
        find_targets(tiny_llama(), LowRankConfig(**settings))


def test_rank_pattern_overrides_a_rank_above_the_limit():
    config = LowRankConfig(rank=20, rank_pattern={"k_proj": 8, "v_proj": None})
    assert len(find_targets(tiny_llama(), config)) == 14


def test_later_rank_patterns_win():
    model = tiny_llama()
    pattern = {"q_proj": 3, "layers.1.*": None, "layers.1.mlp.up_proj": 5}
    config = LowRankConfig(target_modules=["q_proj", "up_proj"], rank_pattern=pattern)
    assert fixed_ranks(find_targets(model, config), config) == {
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.1.self_attn.q_proj": None,
        "model.layers.1.mlp.up_proj": 5,
    }


def test_linear_weight_is_out_by_in_and_no_copy():
    linear, conv = nn.Linear(3, 7), Conv1D(7, 3)
    assert linear_weight(linear).shape == linear_weight(conv).shape == (7, 3)
    assert linear_weight(conv).data_ptr() == conv.weight.data_ptr()
    assert torch.equal(linear_weight(conv), conv.weight.T)
    assert not linear_weight(linear).requires_grad


def test_untouched_weights_are_the_other_matrices_of_the_blocks():
    model = tiny_mixtral()
    targets = find_targets(model, LowRankConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    expected = {
        "mlp.gate.weight": 4 * 32,
        "mlp.experts.gate_up_proj": 4 * 128 * 32,
        "mlp.experts.down_proj": 4 * 32 * 64,
        "self_attn.o_proj.weight": 32 * 32,
    }
    assert untouched_weights(model, targets) == {
        f"model.layers.{index}.{name}": size for index in (0, 1) for name, size in expected.items()
    }


def test_a_dense_model_with_all_layers_targeted_has_no_untouched_weight():
    model = tiny_gpt2()
    assert untouched_weights(model, find_targets(model, LowRankConfig())) == {}

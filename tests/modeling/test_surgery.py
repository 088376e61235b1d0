"""Edits of a model: nothing is changed by a refused call, and everything can be taken back."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank import LowRankConfig, LowRankLinear, compress, merge
from hf_lowrank.decomposition.metrics import QuadraticForm
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.errors import ConfigError, NumericalError, TargetError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.modeling.surgery import factorize_, factorized, lowrank_from_factors, restore_
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.plan import RankPlan
from tests.tiny_models import logits, tiny_bert_classifier, tiny_gpt2, tiny_llama, token_batches

Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"
BATCH = token_batches(1)[0]


def cut(model, ranks):
    """Plain factors and a plan for some layers."""
    layers = {name: model.get_submodule(name) for name in ranks}
    factors = {n: decompose(linear_weight(m), QuadraticForm())[1] for n, m in layers.items()}
    return factors, RankPlan(ranks, {n: linear_shape(m) for n, m in layers.items()})


def snapshot(model):
    """Identity of every module and a copy of every tensor."""
    modules = {name: id(module) for name, module in model.named_modules()}
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in tensors.items())
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model.config, "auto_map")
    assert "save_pretrained" not in vars(model)


def test_factorize_replaces_the_planned_layers_only():
    model = tiny_llama()
    kept = model.get_submodule("model.layers.0.mlp.up_proj")
    factors, plan = cut(model, {Q_PROJ: 4, UP_PROJ: 7, "model.layers.0.mlp.up_proj": None})
    factorize_(model, factors, plan)
    lowrank = {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert lowrank == {Q_PROJ: 4, UP_PROJ: 7}
    assert model.get_submodule("model.layers.0.mlp.up_proj") is kept


@pytest.mark.parametrize("form", ["factors", "compact"])
def test_layers_are_stored_in_the_form_that_the_plan_counts(form):
    model = tiny_llama()
    factors, plan = cut(model, {Q_PROJ: 4, UP_PROJ: 7})
    plan = dataclasses.replace(plan, form=form)
    factorize_(model, factors, plan)
    layers = [model.get_submodule(name) for name in plan.ranks]
    assert {layer.form for layer in layers} == {form}
    stored = sum(weight.numel() for layer in layers for weight in layer.parameters())
    assert stored == plan.kept_parameters


def test_factors_multiply_to_the_best_approximation():
    model = tiny_llama()
    weight = linear_weight(model.get_submodule(UP_PROJ)).double()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    factorize_(model, *cut(model, {UP_PROJ: 6}))
    found = model.get_submodule(UP_PROJ).dense_weight().double()
    torch.testing.assert_close(found, u[:, :6] * s[:6] @ vh[:6], rtol=1e-4, atol=1e-5)


def test_each_component_s_scale_is_shared_between_both_factors():
    model = tiny_llama()
    factorize_(model, *cut(model, {UP_PROJ: 6}))
    layer = model.get_submodule(UP_PROJ)
    norms = layer.lowrank_A.weight.norm(dim=1)
    torch.testing.assert_close(norms, layer.lowrank_B.weight.norm(dim=0))
    assert norms[0] > norms[5]


def test_full_rank_changes_no_output_but_a_low_rank_does():
    model = tiny_gpt2()
    dense, ranks = logits(model, BATCH), dict.fromkeys(find_targets(model, LowRankConfig()), 32)
    with factorized(model, *cut(model, ranks)):
        torch.testing.assert_close(logits(model, BATCH), dense, rtol=1e-3, atol=1e-4)
    with factorized(model, *cut(model, dict.fromkeys(ranks, 8))):
        assert (logits(model, BATCH) - dense).abs().max() > 0.1


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Linear(7, 5, bias=False), Conv1D(7, 5)])
def test_a_factorized_layer_keeps_bias_dtype_and_flags(layer):
    layer = layer.to(torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    lowrank = lowrank_from_factors(layer, decompose(linear_weight(layer), QuadraticForm())[1], 2)
    assert linear_shape(lowrank) == linear_shape(layer)
    assert lowrank.conv1d == isinstance(layer, Conv1D)
    assert not lowrank.training
    assert not any(parameter.requires_grad for parameter in lowrank.parameters())
    assert {parameter.dtype for parameter in lowrank.parameters()} == {torch.bfloat16}
    if layer.bias is None:
        assert lowrank.bias is None
    else:
        assert torch.equal(lowrank.bias, layer.bias)
        assert lowrank.bias is not layer.bias


def test_restore_puts_the_very_same_layers_back():
    model = tiny_llama()
    before = snapshot(model)
    originals = factorize_(model, *cut(model, {Q_PROJ: 4, UP_PROJ: 7}))
    assert set(originals) == {Q_PROJ, UP_PROJ}
    restore_(model, originals)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_factorized_restores_after_an_exception(error):
    model = tiny_gpt2()
    before = snapshot(model)

    def fail_halfway():
        with factorized(model, *cut(model, {"transformer.h.0.mlp.c_fc": 4})) as lowrank:
            assert isinstance(lowrank.transformer.h[0].mlp.c_fc, LowRankLinear)
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.2.mlp.up_proj", (64, 32), "layers.2.mlp.up_proj: the model has no such"),
        ("model.norm", (32, 32), "model.norm: only nn.Linear and Conv1D .* not LlamaRMSNorm"),
        ("model.embed_tokens", (96, 32), "embed_tokens: only nn.Linear and Conv1D .* Embedding"),
        ("lm_head", (96, 32), "lm_head: the plan gives it a rank, but it was not decomposed"),
        (UP_PROJ, (32, 64), r"up_proj: the layer has shape \(64, 32\), the plan .* \(32, 64\)"),
    ],
)
def test_a_plan_that_does_not_fit_leaves_the_model_untouched(name, shape, message):
    model = tiny_llama(tie_word_embeddings=False)
    before = snapshot(model)
    factors, plan = cut(model, {Q_PROJ: 4, UP_PROJ: 4})
    bad = RankPlan({Q_PROJ: 4, name: 4}, {Q_PROJ: plan.shapes[Q_PROJ], name: shape})
    with pytest.raises(TargetError, match=message):
        factorize_(model, factors, bad)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"target_modules": ["nothing"]}, TargetError),
        ({"exclude_modules": ["nothing"]}, TargetError),
        ({"rank_pattern": {"nothing": 3}}, TargetError),
        ({"rank": 33}, ConfigError),
        ({"param_ratio": 0.001}, ConfigError),
        ({"param_ratio": 0.5, "rank_pattern": {"*_proj": None}}, ConfigError),
    ],
)
def test_a_refused_compression_leaves_the_model_untouched(settings, error):
    model = tiny_llama()
    before = snapshot(model)
    goal = {} if {"rank", "param_ratio"} & set(settings) else {"param_ratio": 0.5}
    with pytest.raises(error):
        compress(model, LowRankConfig(metric="plain", **goal, **settings), progress=False)
    assert_unchanged(model, before)


def test_factors_that_are_not_finite_are_refused_by_name_and_change_nothing():
    model = tiny_llama()
    factors, plan = cut(model, {Q_PROJ: 4, UP_PROJ: 7})
    factors[UP_PROJ].left[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(NumericalError) as raised:
        factorize_(model, factors, dataclasses.replace(plan, form="compact"))
    assert str(raised.value) == (
        f"{UP_PROJ}: the factor holds NaN or infinity. Exclude the layer, or use other calibration "
        "data."
    )
    assert_unchanged(model, before)


def test_compressing_twice_is_refused_and_changes_nothing():
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.5, metric="plain")
    compress(model, config, progress=False)
    before = snapshot(model)
    with pytest.raises(TargetError, match="already compressed"):
        compress(model, config, progress=False)
    assert snapshot(model)[0] == before[0]
    assert model.config.quantization_config.ranks


def test_rank_pattern_fixes_ranks_and_counts_towards_the_budget():
    model = tiny_llama()
    pattern = {"q_proj": 3, "layers.1.mlp.*": None}
    config = LowRankConfig(param_ratio=0.7, metric="plain", rank_pattern=pattern)
    report = compress(model, config, progress=False)
    assert report.ranks["model.layers.0.self_attn.q_proj"] == 3
    assert report.ranks["model.layers.1.self_attn.q_proj"] == 3
    assert report.ranks["model.layers.1.mlp.down_proj"] is None
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Linear)
    assert report.parameters.targeted_kept <= 0.7 * report.parameters.targeted_dense


def test_one_rank_for_all_leaves_layers_dense_where_it_saves_nothing():
    model = tiny_llama()
    report = compress(model, LowRankConfig(rank=11, metric="plain"), progress=False)
    for name, rank in report.ranks.items():
        # 16 x 32 has its break-even rank at 512 / 48 = 10.7.
        assert rank == (None if name.endswith(("k_proj", "v_proj")) else 11), name


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_merging_gives_a_dense_model_with_the_same_output(build):
    model, dense = build(), build()
    compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    expected = logits(model, BATCH)
    assert (expected - logits(dense, BATCH)).abs().max() > 0.1
    assert merge(model) is model
    torch.testing.assert_close(logits(model, BATCH), expected, rtol=1e-3, atol=1e-4)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in dense.named_modules()
    ]
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in dense.state_dict().items()
    }


def test_merging_removes_the_marks_and_allows_another_compression():
    model = tiny_bert_classifier()
    untouched = snapshot(model)
    config = LowRankConfig(param_ratio=0.5, metric="plain")
    compress(model, config, progress=False)
    merge(model)
    assert snapshot(model)[1].keys() == untouched[1].keys()
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")
    assert compress(model, config, progress=False).ranks


def test_the_auto_map_of_a_model_with_its_own_code_survives():
    model, own = tiny_llama(), {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    model.config.auto_map = dict(own)
    compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    assert model.config.auto_map.items() >= own.items()
    assert merge(model).config.auto_map == own


@pytest.mark.parametrize("training", [True, False])
def test_merging_keeps_the_training_mode(training):
    model = tiny_llama().train(training)
    compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    merge(model)
    assert {module.training for module in model.modules()} == {training}


def test_merging_keeps_frozen_layers_frozen():
    model = tiny_llama().requires_grad_(False)
    compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    merge(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_merging_a_dense_model_is_refused():
    with pytest.raises(TargetError, match="no low-rank or narrowed layer to merge"):
        merge(tiny_llama())

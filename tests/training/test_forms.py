"""From dense or compressed to the training form, and back."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_lowrank
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import NumericalError, TargetError
from hf_lowrank.format.rebuild import factorized_layers, narrowed_layers
from hf_lowrank.modeling.marks import attach_config_
from hf_lowrank.training.form_changes import current_ranks, to_inference_form_, to_training_form_
from hf_lowrank.training.truncation import get_factors, set_factors_
from tests.tiny_models import logits, tiny_gpt2, tiny_llama, tiny_opt, token_batches


def test_training_form_has_orthonormal_factors_and_the_dense_spectrum():
    model = tiny_llama()
    dense = {n: m.weight.detach().clone() for n, m in model.named_modules() if n.endswith("_proj")}
    layers = to_training_form_(model, LowRankConfig())
    assert set(layers) == set(dense)
    for name, layer in layers.items():
        U, V = layer.lowrank_B.weight, layer.lowrank_A.weight
        eye = torch.eye(layer.rank)
        torch.testing.assert_close(U.T @ U, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(V @ V.T, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            layer.lowrank_s.detach(), torch.linalg.svdvals(dense[name]), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(layer.dense_weight(), dense[name], atol=1e-5, rtol=1e-4)


def test_a_fixed_rank_is_the_best_approximation_and_keeps_the_bias():
    model = tiny_opt()
    dense = copy.deepcopy(model.get_submodule("model.decoder.layers.0.fc1"))
    layers = to_training_form_(
        model, LowRankConfig(target_modules=["layers.0.fc1"], rank_pattern={"fc1": 6})
    )
    layer = layers["model.decoder.layers.0.fc1"]
    error = (layer.dense_weight() - dense.weight).square().sum()
    tail = torch.linalg.svdvals(dense.weight)[6:].square().sum()
    assert error.item() == pytest.approx(tail.item(), rel=1e-4)
    assert torch.equal(layer.bias, dense.bias)
    assert layer.training == dense.training


def test_a_compressed_model_keeps_its_ranks_and_its_outputs():
    model = tiny_gpt2()
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    (batch,) = token_batches(1)
    before = logits(model, batch)
    ranks = {name: layer.rank for name, layer in factorized_layers(model).items()}
    layers = to_training_form_(model, LowRankConfig())
    assert {name: layer.rank for name, layer in layers.items()} == ranks
    assert {layer.form for layer in layers.values()} == {"usv"}
    assert all(layer.conv1d for layer in layers.values())
    for layer in layers.values():
        U = layer.lowrank_B.weight
        torch.testing.assert_close(U.T @ U, torch.eye(layer.rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(model, batch), before, atol=3e-5, rtol=1e-4)


def test_narrowed_layers_stay_as_they_are(tmp_path):
    model = tiny_gpt2()
    config = LowRankConfig(param_ratio=0.5, channels=True)
    hf_lowrank.compress(model, config, token_batches(3), progress=False)
    (batch,) = token_batches(1)
    before, names = logits(model, batch), set(narrowed_layers(model))
    assert names
    layers = to_training_form_(model, LowRankConfig())
    assert layers
    assert set(narrowed_layers(model)) == names
    torch.testing.assert_close(logits(model, batch), before, atol=3e-5, rtol=1e-4)
    attach_config_(model, LowRankConfig(ranks=current_ranks(model, layers), form="usv"))
    model.save_pretrained(tmp_path)  # with a config that says nothing of channels
    assert torch.equal(logits(hf_lowrank.load(tmp_path), batch), logits(model, batch))


def test_narrowed_layers_alone_leave_nothing_to_select():
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.5, channels=True, target_modules=["mlp.*_proj"])
    hf_lowrank.compress(model, config, token_batches(3), progress=False)
    assert narrowed_layers(model)
    assert not factorized_layers(model)
    with pytest.raises(TargetError, match="no layer has a rank, so there is none to select"):
        to_training_form_(model, LowRankConfig())


def test_the_config_of_a_narrowed_checkpoint_trains_its_ranks():
    model = tiny_gpt2()
    config = LowRankConfig(param_ratio=0.5, channels=True)
    hf_lowrank.compress(model, config, token_batches(3), progress=False)
    assert to_training_form_(model, model.config.quantization_config)


def test_frozen_layers_stay_frozen():
    model = tiny_llama().requires_grad_(False)
    layers = to_training_form_(model, LowRankConfig())
    assert not any(p.requires_grad for layer in layers.values() for p in layer.parameters())


def test_inference_form_folds_spectra_of_both_signs_and_multiplies_out_above_break_even():
    model = tiny_gpt2()
    names = {"c_fc": 5, "mlp.c_proj": 21, "c_attn": 24}  # break-even: 26, 26, 24
    to_training_form_(model, LowRankConfig(target_modules=list(names)))
    for name, layer in factorized_layers(model).items():
        rank = next(r for suffix, r in names.items() if name.endswith(suffix))
        U, s, V = (part.clone() for part in get_factors(layer))
        s[::2] *= -1
        set_factors_(layer, (U[:, :rank], s[:rank], V[:rank]))
    (batch,) = token_batches(1)
    before = logits(model, batch)
    assert to_inference_form_(model) is model
    torch.testing.assert_close(logits(model, batch), before, atol=2e-5, rtol=1e-4)
    forms = {type(model.get_submodule(f"transformer.h.0.{n}")) for n in ("attn.c_attn",)}
    assert forms == {Conv1D}
    kept = factorized_layers(model)
    assert {name.split(".", 3)[3] for name in kept} == {"mlp.c_fc", "mlp.c_proj"}
    for layer in kept.values():
        assert layer.form == "factors"
        torch.testing.assert_close(
            layer.lowrank_B.weight.norm(dim=0), layer.lowrank_A.weight.norm(dim=1)
        )


def test_the_compact_form_holds_the_same_product_up_to_full_rank():
    model = tiny_gpt2()
    names = {"c_fc": 5, "mlp.c_proj": 31, "c_attn": 32}  # of 32
    to_training_form_(model, LowRankConfig(target_modules=list(names)))
    for name, layer in factorized_layers(model).items():
        rank = next(r for suffix, r in names.items() if name.endswith(suffix))
        U, s, V = (part.clone() for part in get_factors(layer))
        s[::2] *= -1
        set_factors_(layer, (U[:, :rank], s[:rank], V[:rank]))
    (batch,) = token_batches(1)
    before = logits(model, batch)
    to_inference_form_(model, "compact")
    torch.testing.assert_close(logits(model, batch), before, atol=2e-5, rtol=1e-4)
    kept = factorized_layers(model)
    assert {name.split(".", 3)[3]: layer.rank for name, layer in kept.items()} == {
        "mlp.c_fc": 5,
        "mlp.c_proj": 31,
    }
    assert {layer.form for layer in kept.values()} == {"compact"}
    assert isinstance(model.get_submodule("transformer.h.0.attn.c_attn"), Conv1D)
    layers = to_training_form_(model, LowRankConfig())
    assert {layer.form for layer in layers.values()} == {"usv"}
    torch.testing.assert_close(logits(model, batch), before, atol=5e-5, rtol=1e-4)


def test_inference_form_leaves_factors_and_dense_layers_alone():
    model = tiny_llama()
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_inference_form_(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_current_ranks_are_none_where_a_layer_is_dense():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": hf_lowrank.LowRankLinear(4, 4, 1)})
    assert current_ranks(model, {"a": None, "b": None}) == {"a": None, "b": 1}


def test_layers_that_cannot_be_factorized_stay_dense():
    model = tiny_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    batch = token_batches(1)[0]
    before = logits(model, batch)
    layers = to_training_form_(model, LowRankConfig())
    assert len(layers) == 12
    assert {type(first), type(second)} == {nn.Linear}
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)


def test_a_dense_weight_that_is_not_finite_is_refused_by_name():
    model, name = tiny_llama(), "model.layers.0.mlp.up_proj"
    model.get_submodule(name).weight.data[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=f"^{name}: the weight holds .*exclude the layer.$"):
        to_training_form_(model, LowRankConfig())

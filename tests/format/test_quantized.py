"""Quantized weights in a checkpoint: what a file holds of them, and damage to it."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.layout import Precision
from hf_lowrank.format.torchao_weights import (
    NUMBERS,
    SCALE,
    assemble_,
    expect_,
    num_bytes,
    precision_of,
    quantize_,
    quantized_modules,
)
from tests.format import BATCH, LAYER, edit_config, edit_tensors, refused, same_tensors
from tests.tiny_models import logits, tiny_llama

torchao = pytest.importorskip("torchao.quantization")

INT4 = {"bits": 4, "block": [1, 32]}


@pytest.fixture
def broken_int4(int4, tmp_path):
    """A copy of a checkpoint in int4, for a test to damage."""
    return Path(shutil.copytree(int4.folder, tmp_path / "broken"))


def random_layer(shape, dtype=torch.float32):
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    torch.nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "precision"),
    [
        ((6, 10), Precision(8, (1, 10))),
        ((6, 1), Precision(8, (6, 1))),
        ((64, 96), Precision(4, (1, 32))),
        ((64, 7), Precision(4, (32, 1))),
        ((5, 7), Precision(4, (1, 7))),
    ],
)
def test_a_file_gives_the_numbers_back(shape, precision, dtype):
    layer, empty = random_layer(shape, dtype), random_layer(shape, dtype)
    dense = linear_weight(layer).clone()
    quantize_(layer, precision)
    assert precision_of(layer.weight) == precision
    stored = layer.state_dict()
    assert stored.keys() == {NUMBERS, SCALE}
    assert stored[NUMBERS].dtype == (torch.int8 if precision.bits == 8 else torch.uint8)
    assert stored[SCALE].dtype == dtype
    assert sum(map(num_bytes, stored.values())) == num_bytes(layer.weight)
    expect_(empty, precision)
    empty.load_state_dict(stored)
    assemble_(empty)
    assert type(empty.weight) is type(layer.weight)
    assert torch.equal(linear_weight(empty), linear_weight(layer))
    off = (linear_weight(layer) - dense).norm() / dense.norm()
    assert 0 < off < (0.012 if precision.bits == 8 else 0.12)


def test_all_sixteen_numbers_survive_packing():
    layer, empty = random_layer((2, 9)), random_layer((2, 9))
    with torch.no_grad():
        layer.weight.copy_(torch.arange(-8, 10).clamp(max=7).reshape(2, 9))
    quantize_(layer, Precision(4, (1, 9)))
    weight = layer.weight
    weight.qdata.copy_(torch.arange(-8, 10).clamp(max=7).reshape(2, 9))
    expect_(empty, precision_of(weight))
    empty.load_state_dict(layer.state_dict())
    assemble_(empty)
    assert torch.equal(empty.weight.qdata, weight.qdata)


def test_a_quantized_state_can_be_loaded_into_a_quantized_layer():
    one, other = random_layer((8, 6)), random_layer((8, 6))
    with torch.no_grad():
        other.weight.mul_(3)
    for layer in (one, other):
        quantize_(layer, Precision(4, (8, 1)))
    other.load_state_dict(one.state_dict())
    assert torch.equal(linear_weight(other), linear_weight(one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_layer_multiplies_by_the_numbers_it_stands_for(bits, dtype):
    layer = random_layer((32, 64), dtype)
    quantize_(layer, Precision(bits, (1, 64 if bits == 8 else 32)))
    inputs = 1000 * torch.randn(3, 64, dtype=dtype)  # times 127 and summed, too much for fp16
    expected = inputs.float() @ linear_weight(layer).float().T
    scale = float(expected.abs().max())
    torch.testing.assert_close(layer(inputs).float() / scale, expected / scale, atol=2e-2, rtol=0)


def test_int4_takes_two_numbers_to_a_byte(int4):
    tensors = load_file(int4.folder / "model.safetensors")
    config = int4.model.config.quantization_config
    assert config.weights == "int4"
    bits = {name: each["bits"] for name, each in config.quantized.items()}
    assert {name for name in bits if bits[name] == 8} == {
        name for name in bits if name.endswith("lowrank_B")
    }
    modules = {n: m for n, m in quantized_modules(int4.model).items() if bits[n] == 4}
    for name, module in modules.items():
        numbers = tensors[f"{name}.{NUMBERS}"]
        assert numbers.dtype == torch.uint8
        assert numbers.shape == (module.out_features, (module.in_features + 1) // 2)
        assert f"{name}.weight" not in tensors
    quantized = [tensors[f"{name}.{part}"] for name in modules for part in (NUMBERS, SCALE)]
    count = sum(m.in_features * m.out_features for m in modules.values())
    # Half a byte, and 4 for each scale of about 32 numbers, which is fp32 as the model is.
    assert sum(map(num_bytes, quantized)) < (0.5 + 4 / 25) * count
    rest = sum(num_bytes(t) for t in tensors.values()) - sum(map(num_bytes, quantized))
    size = (int4.folder / "model.safetensors").stat().st_size
    assert size < rest + 0.66 * count + 200 * len(tensors)


def test_embeddings_and_heads_stay(int8, int4):
    for saved in (int8, int4):
        assert type(saved.model.get_input_embeddings().weight) is torch.nn.Parameter
        head = saved.model.get_output_embeddings().weight
        assert head is saved.model.get_input_embeddings().weight  # tied
        model = hf_lowrank.load(saved.folder)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_loaded_in_another_dtype(form, request):
    saved = request.getfixturevalue(form)
    model = AutoModelForCausalLM.from_pretrained(saved.folder, dtype=torch.bfloat16)
    assert {m.weight.dtype for m in quantized_modules(model).values()} == {torch.bfloat16}
    expected = logits(saved.model, BATCH)
    assert (logits(model, BATCH) - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_merging_gives_the_numbers_that_are_multiplied(form, request):
    saved = request.getfixturevalue(form)
    model = hf_lowrank.merge(hf_lowrank.load(saved.folder))
    assert not quantized_modules(model)
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = logits(saved.model, BATCH)
    torch.testing.assert_close(logits(model, BATCH), expected, atol=1e-4, rtol=1e-4)


def test_a_model_with_quantized_dense_layers_alone(tmp_path):
    model = tiny_llama()
    settings = {"ranks": {LAYER: None}, "target_modules": [LAYER], "metric": "plain"}
    compress(model, LowRankConfig(**settings, weights="int4"), progress=False)
    model.save_pretrained(tmp_path)
    loaded = hf_lowrank.load(tmp_path)
    assert quantized_modules(loaded).keys() == {LAYER}
    assert same_tensors(loaded, model)
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a"], r"bad quantization_config: quantized must map names to precisions, got \['a'\]"),
        ({LAYER: 4}, r"quantized\['model.*q_proj'\] must be {\"bits\": 4 or 8, \"block\": .*got 4"),
        ({LAYER: {"bits": 4}}, r"quantized\['model.*q_proj'\] must be .*got {'bits': 4}"),
        ({LAYER: {"bits": 3, "block": [1, 32]}}, "must be .*got {'bits': 3"),
        ({LAYER: {"bits": 4, "block": [1, 0]}}, "must be .*got {'bits': 4"),
        ({LAYER: {"bits": True, "block": [1, 2]}}, "must be .*got {'bits': True"),
    ],
)
def test_what_no_writer_would_write_is_refused(broken_int4, value, message):
    edit_config(broken_int4, lambda c: c["quantization_config"].update(quantized=value))
    refused(broken_int4, message)


def rewrite(folder, name, precision):
    edit_config(folder, lambda c: c["quantization_config"]["quantized"].update({name: precision}))


def test_blocks_that_do_not_divide_a_weight_are_refused(broken_int4):
    rewrite(broken_int4, LAYER, {"bits": 4, "block": [1, 5]})
    refused(broken_int4, r"q_proj: a weight of shape \[32, 32\] has no blocks of shape \[1, 5\]")


def test_a_precision_that_does_not_fit_the_tensors_is_refused(broken_int4):
    rewrite(broken_int4, LAYER, {"bits": 8, "block": [1, 32]})
    shapes = r"\[32, 16\] and \[32, 1\]; it asks for \[32, 32\] and \[32, 1\]"
    refused(broken_int4, rf"q_proj has precision 8 bits in blocks of 1 x 32 .*{shapes}")


def test_a_factor_whose_numbers_are_missing_is_refused(broken_int4, int4):
    name = next(n for n in quantized_modules(int4.model) if n.endswith("lowrank_B"))
    edit_tensors(broken_int4, lambda tensors: tensors.pop(f"{name}.{SCALE}"))
    refused(broken_int4, r"has rank \d+ in config\.json but no factors")


@pytest.mark.parametrize(
    ("end", "dtype"), [(NUMBERS, torch.int32), (NUMBERS, torch.bool), (SCALE, torch.int32)]
)
def test_tensors_of_other_types_than_a_quantized_weight_has_are_refused(broken_int4, end, dtype):
    def retype(tensors):
        name = next(name for name in sorted(tensors) if name.endswith(end))
        tensors[name] = tensors[name].to(dtype)

    edit_tensors(broken_int4, retype)
    refused(broken_int4, "is stored as torch.* with scales in torch.*; numbers are int8, or uint8")
    with pytest.raises(hf_lowrank.LowRankError, match="numbers are int8, or uint8 for two of 4"):
        AutoModelForCausalLM.from_pretrained(broken_int4)


def test_a_factor_that_config_does_not_know_to_be_quantized_is_refused(broken_int4, int4):
    name = next(n for n in quantized_modules(int4.model) if n.endswith("lowrank_B"))
    edit_config(broken_int4, lambda c: c["quantization_config"]["quantized"].pop(name))
    refused(broken_int4, r"has rank \d+ in config\.json but no factors")


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj", "model.norm"])
def test_a_precision_of_what_is_no_linear_layer_is_refused(broken_int4, name):
    rewrite(broken_int4, name, INT4)
    refused(broken_int4, f"{name.split('.')[-1]}.*(has no such layer|can be factorized)")


def test_a_precision_of_a_missing_factor_is_refused(broken_int4, int4):
    ranks = int4.model.config.quantization_config.ranks
    layer = next(name for name, rank in ranks.items() if rank is not None)
    rewrite(broken_int4, f"{layer}.lowrank_C", INT4)
    refused(broken_int4, "lowrank_C: config.json gives it a precision, but it is no linear layer")


def test_torchao_is_asked_for_before_anything_is_read(int4, monkeypatch):
    found = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "torchao" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    message = r"^This checkpoint's weights are quantized, which needs torchao 0\.18 or newer: pip"
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(int4.folder)
    refused(int4.folder, "weights are quantized, which needs torchao")


def test_an_older_torchao_is_refused(int4, monkeypatch):
    monkeypatch.delattr(torchao, "Int8Tensor")
    with pytest.raises(ConfigError, match=r"needs torchao 0\.18 or newer"):
        AutoModelForCausalLM.from_pretrained(int4.folder)

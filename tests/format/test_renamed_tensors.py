"""Architectures that are saved under other names than their modules have."""

import shutil
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    NomicBertConfig,
    NomicBertModel,
    ViTConfig,
    ViTForImageClassification,
)

import hf_lowrank
from hf_lowrank import LowRankConfig, compress
from tests.format import edit_config, edit_tensors, load_clean, refused, same_tensors
from tests.tiny_models import num_lowrank

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGE = {"image_size": 16, "patch_size": 8}


def tiny_vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, initializer_range=0.2)).eval()


def tiny_gemma3():
    torch.manual_seed(0)
    text = SIZES | {"vocab_size": 96, "num_key_value_heads": 2, "head_dim": 8}
    special = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}
    config = Gemma3Config(
        text_config=text, vision_config=SIZES | IMAGE, mm_tokens_per_image=4, **special
    )
    return Gemma3ForConditionalGeneration(config).eval()


class Kind(NamedTuple):
    """An architecture: a layer of it, and how the file calls that layer and a norm beside it."""

    build: object
    auto_class: type
    layer: str
    stored_layer: str
    stored_norm: str
    norm: str


KINDS = {
    "vit": Kind(
        tiny_vit,
        AutoModelForImageClassification,
        "vit.layers.0.attention.k_proj",
        "vit.encoder.layer.0.attention.attention.key",
        "vit.encoder.layer.0.layernorm_before.weight",
        "vit.layers.0.layernorm_before.weight",
    ),
    "gemma3": Kind(
        tiny_gemma3,
        AutoModelForImageTextToText,
        "model.language_model.layers.0.self_attn.k_proj",
        "language_model.model.layers.0.self_attn.k_proj",
        "language_model.model.layers.0.input_layernorm.weight",
        "model.language_model.layers.0.input_layernorm.weight",
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(kind):
    model = kind.build()
    config = LowRankConfig(param_ratio=0.6, metric="plain", rank_pattern={kind.layer: 5})
    compress(model, config, progress=False)
    return model


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("renamed")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(good, tmp_path):
    """A copy of a good checkpoint, for a test to damage."""
    return shutil.copytree(good, tmp_path / "broken")


def test_the_file_has_other_names(kind, good):
    names = load_file(good / "model.safetensors").keys()
    assert {f"{kind.stored_layer}.lowrank_A.weight", kind.stored_norm} <= names
    assert f"{kind.layer}.lowrank_A.weight" not in names


def test_strict_load_gives_the_same_model(kind, model, good):
    loaded = hf_lowrank.load(good)
    assert type(loaded) is type(model)
    assert num_lowrank(loaded) == num_lowrank(model) > 0
    assert same_tensors(loaded, model)
    assert same_tensors(load_clean(kind.auto_class, good), model)


def test_names_of_modules_load_too(model, tmp_path):
    model.save_pretrained(tmp_path, save_original_format=False)
    assert same_tensors(hf_lowrank.load(tmp_path), model)


def test_a_loaded_model_saves_what_loads(good, model, tmp_path):
    hf_lowrank.load(good).save_pretrained(tmp_path)
    assert same_tensors(hf_lowrank.load(tmp_path), model)


def test_a_rank_that_does_not_fit_is_refused(kind, broken):
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].update({kind.layer: 4}))
    refused(broken, rf"{kind.layer} has rank 4 in config\.json but factors of shape \[5, 32")


def test_factors_of_a_layer_that_should_be_dense_are_refused(kind, broken):
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].update({kind.layer: None}))
    refused(broken, rf"{kind.layer} is dense in config\.json but has factors")


def test_a_missing_factor_is_refused(kind, broken):
    edit_tensors(broken, lambda tensors: tensors.pop(f"{kind.stored_layer}.lowrank_B.weight"))
    refused(broken, rf"{kind.layer} has rank 5 in config\.json but no factors")


def test_a_factor_of_the_wrong_width_is_refused(kind, broken):
    name = f"{kind.stored_layer}.lowrank_A.weight"
    edit_tensors(broken, lambda tensors: tensors.update({name: torch.zeros(5, 40)}))
    shapes = r"\[5, 40\] and \[\d+, 5\]; it asks for \[5, 32\] and \[\d+, 5\]"
    refused(broken, rf"{kind.layer} has rank 5 in config\.json but factors of shape {shapes}")


def test_a_tensor_of_another_shape_is_refused(kind, broken):
    edit_tensors(broken, lambda tensors: tensors.update({kind.stored_norm: torch.zeros(33)}))
    refused(broken, rf"{kind.norm} has shape \[33\], config\.json asks for \[32\]")


def test_a_missing_tensor_is_refused(kind, broken):
    edit_tensors(broken, lambda tensors: tensors.pop(kind.stored_norm))
    refused(broken, f"1 missing keys, for example {kind.norm}")


def test_a_left_over_tensor_is_refused(broken):
    edit_tensors(broken, lambda tensors: tensors.update(extra=torch.zeros(2)))
    refused(broken, "1 unexpected keys, for example .*extra")


def test_a_tensor_under_both_names_is_refused(kind, broken):
    edit_tensors(broken, lambda tensors: tensors.update({kind.norm: torch.zeros(32)}))
    refused(broken, f"two tensors are for {kind.norm}")


@pytest.mark.parametrize("goal", [{"param_ratio": 0.6, "rule": "energy"}, {"rank": 4}])
@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_layers_that_transformers_would_join_are_saved_apart(goal, targets, tmp_path):
    """It joins q, k and v, which must be of one kind and rank for that."""
    torch.manual_seed(0)
    model = NomicBertModel(NomicBertConfig(**SIZES, vocab_size=96, pad_token_id=0)).eval()
    compress(model, LowRankConfig(metric="plain", target_modules=targets, **goal), progress=False)
    model.save_pretrained(tmp_path)
    assert same_tensors(hf_lowrank.load(tmp_path), model)
    assert same_tensors(load_clean(NomicBertModel, tmp_path), model)


def test_a_dense_model_keeps_its_joined_layers(tmp_path):
    model = NomicBertModel(NomicBertConfig(**SIZES, vocab_size=96, pad_token_id=0))
    compress(model, LowRankConfig(metric="plain", rank=4), progress=False)
    hf_lowrank.merge(model).save_pretrained(tmp_path)
    assert any("Wqkv" in name for name in load_file(tmp_path / "model.safetensors"))

"""What vLLM is told of a checkpoint's layers, and what is refused."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
from torch import nn

from hf_lowrank.errors import CheckpointError, ConfigError
from tests.serving.vllm import stubs

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
SETTINGS = {"format_version": 2, "form": "compact", "ranks": {"model.layers.0.attn.k_proj": 3}}


@pytest.fixture
def config(vllm_config):
    made = stubs.REGISTERED["lowrank"].from_config(SETTINGS)
    made.packed_modules_mapping = PACKED
    return made


def layer(layer_class=stubs.QKVParallelLinear):
    return layer_class.__new__(layer_class)


def test_registering_needs_no_vllm_before_it_is_called():
    code = "import sys, hf_lowrank.serving.vllm; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_registering_may_be_repeated(vllm_config):
    from hf_lowrank.serving.vllm import register

    register()
    register()
    assert stubs.REGISTERED["lowrank"].from_config(SETTINGS).get_name() == "lowrank"


def test_a_config_goes_to_other_processes(config):
    assert pickle.loads(pickle.dumps(config)).layout == config.layout


def test_a_merged_layer_with_a_compressed_part_is_held_here(config):
    found = config.get_quant_method(layer(), "model.layers.0.attn.qkv_proj")
    assert type(found).__name__ == "LowRankLinearMethod"


def test_dense_layers_are_left_to_vllm(config):
    found = config.get_quant_method(layer(), "model.layers.1.attn.qkv_proj")
    assert type(found) is stubs.UnquantizedLinearMethod
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None


def test_names_are_changed_as_the_model_class_wants(config):
    def apply_dict(values):
        return {f"language_model.{name}": value for name, value in values.items()}

    config.apply_vllm_mapper(SimpleNamespace(apply_dict=apply_dict))
    assert list(config.layout.ranks) == ["language_model.model.layers.0.attn.k_proj"]
    assert config.listed.unclaimed == set(config.layout.ranks)


@pytest.mark.parametrize(("model_type", "transposed"), [("gpt2", True), ("llama", False)])
def test_the_file_is_checked_first(config, vllm_config, monkeypatch, model_type, transposed):
    checked = []
    monkeypatch.setattr(vllm_config, "check", lambda folder, **hub: checked.append((folder, hub)))
    config.maybe_update_config("folder", SimpleNamespace(model_type=model_type), "main")
    assert checked == [("folder", {"revision": "main"})]
    assert config.is_transposed is transposed


def test_the_training_form_is_refused(vllm_config):
    with pytest.raises(CheckpointError, match=r"form 'usv' .* not served; .*export\(\) returns"):
        stubs.REGISTERED["lowrank"].from_config({**SETTINGS, "form": "usv"})


def test_a_newer_version_is_refused(vllm_config):
    with pytest.raises(CheckpointError, match=r"format_version 4, this hf_lowrank reads 1, 2, 3"):
        stubs.REGISTERED["lowrank"].from_config({**SETTINGS, "format_version": 4})


def test_adapters_are_refused(config):
    stubs.RUN.lora_config = object()
    with pytest.raises(ConfigError, match=r"^LoRA adapters on compressed layers are not served"):
        config.get_quant_method(layer(), "model.layers.0.attn.qkv_proj")


def test_quantizing_while_loading_is_refused(config):
    config.online_quantization_config = object()
    with pytest.raises(ConfigError, match=r"^compressed layers are not quantized while loading"):
        config.get_quant_method(layer(), "model.layers.0.attn.qkv_proj")


@pytest.mark.parametrize("prefix", ["model.layers.0", "model.layers.0.attn.k_proj"])
def test_a_compressed_expert_or_head_is_refused(config, prefix):
    message = r"^model\.layers\.0\.attn\.k_proj is compressed, but is Embedding in vLLM, .* dense"
    with pytest.raises(CheckpointError, match=message):
        config.get_quant_method(nn.Embedding(2, 2), prefix)


def test_a_layer_that_spreads_its_own_way_is_refused(config):
    message = r"^model\.layers\.0\.attn\.k_proj is compressed, but is OtherLinear in vLLM"
    with pytest.raises(CheckpointError, match=message):
        config.get_quant_method(layer(stubs.OtherLinear), "model.layers.0.attn.qkv_proj")


def test_a_layer_that_vllm_does_not_ask_for_is_refused(config):
    config.get_quant_method(layer(), "model.layers.0.attn.qkv_proj")
    message = r"^model\.layers\.0\.attn\.k_proj: vLLM's model has no linear layer of this name"
    with pytest.raises(CheckpointError, match=message):
        config._check_claims()
    stubs.RUN.parallel_config.pipeline_parallel_size = 2
    config.get_quant_method(layer(), "model.layers.0.attn.qkv_proj")
    config._check_claims()  # the layer may be on another machine


def test_smaller_experts_are_refused(vllm_config):
    left = {"model.layers.0.mlp.experts": {"experts": 4, "width": 8}}
    with pytest.raises(ConfigError, match=r"mlp\.experts: has lost experts or channels"):
        stubs.REGISTERED["lowrank"].from_config({**SETTINGS, "format_version": 3, "experts": left})

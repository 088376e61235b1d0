"""Dense models from folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import ConfigError, DataError, TargetError
from hf_lowrank.inputs import sources
from hf_lowrank.inputs.sources import DEMO_HUB_ID, hub_id, load_causal_lm
from tests.scripts import must_not_happen, save_checkpoint
from tests.tiny_models import equal_states, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model"))


# Folders


def test_a_folder_gives_model_and_tokenizer(checkpoint: str):
    model, tokenizer = load_causal_lm(checkpoint)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert equal_states(model.state_dict(), tiny_llama().state_dict())
    assert not model.training
    assert tokenizer("w00 w92", add_special_tokens=False)["input_ids"] == [3, 95]


def test_other_architectures_load_as_well(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model", tiny_gpt2(), max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert equal_states(load_causal_lm(str(folder))[0].state_dict(), tiny_gpt2().state_dict())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_auto_keeps_the_stored_dtype(tmp_path: Path, stored: torch.dtype):
    folder = save_checkpoint(tmp_path / "model", tiny_llama().to(stored))
    assert next(load_causal_lm(str(folder))[0].parameters()).dtype == stored


def test_a_build_that_does_not_know_about_bfloat16_is_not_warned_of(monkeypatch: Any):
    def unknown() -> bool:
        raise RuntimeError("no such operator")

    assert sources._computes_bfloat16() in (True, False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", unknown)
    assert sources._computes_bfloat16()


@pytest.mark.parametrize(
    ("dtype", "computes", "says"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)],
)
def test_a_processor_without_bfloat16_is_told(
    checkpoint: str, dtype: str, computes: bool, says: bool, monkeypatch: Any, caplog: Any
):
    monkeypatch.setattr(sources, "_computes_bfloat16", lambda: computes)
    load_causal_lm(checkpoint, dtype)
    assert ("no bfloat16 instructions: with dtype float32" in caplog.text) == says


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_can_be_chosen(checkpoint: str, name: str):
    model, _ = load_causal_lm(checkpoint, name)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}


@pytest.mark.parametrize("name", ["int8", "fp32", "", "torch.float32"])
def test_an_unknown_dtype(checkpoint: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_load_pretrained", must_not_happen("the model was loaded"))
    with pytest.raises(
        ConfigError, match=rf"dtype must be one of auto, float32, bfloat16, float16; got '{name}'\."
    ):
        load_causal_lm(checkpoint, name)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(checkpoint: str, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_load_pretrained", must_not_happen("the model was loaded"))
    with pytest.raises(DataError, match=f"device '{device}' is not available: ") as caught:
        load_causal_lm(checkpoint, device=device)
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist_names_the_offline_ways(tmp_path: Path):
    with pytest.raises(
        DataError,
        match=r"no such folder, and the Hub has no such model or can't be reached; offline, give a "
        r"local folder, a \.gguf file or 'demo'\.",
    ):
        load_causal_lm(str(tmp_path / "nothing"))


def test_the_tokenizer_is_read_before_the_weights(checkpoint: str, monkeypatch: pytest.MonkeyPatch):
    def missing(*args: Any, **kwargs: Any) -> None:
        raise OSError("no tokenizer")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", must_not_happen("the weights were read")
    )
    with pytest.raises(DataError, match="is not a readable model folder: no tokenizer"):
        load_causal_lm(checkpoint)


@pytest.mark.parametrize(
    "error",
    [
        OSError("a"),
        ValueError("a"),
        KeyError("a"),
        RuntimeError("a"),
        TypeError("a"),
        Exception("a"),
    ],
)
def test_whatever_the_libraries_raise_is_a_data_error(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(DataError, match="is not a readable model folder: ") as caught:
        load_causal_lm(checkpoint)
    assert caught.value.__cause__ is error


def test_a_long_reason_is_cut_and_stays_on_one_line(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("many\nwords " * 1000)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(DataError, match="many words many words") as caught:
        load_causal_lm(checkpoint)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(checkpoint) + 400


# Quantized and compressed checkpoints


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "lowrank"}, "is already compressed; start from the dense checkpoint"),
        ({"quant_method": "bitsandbytes"}, r"is quantized \(bitsandbytes\)"),
    ],
)
def test_a_checkpoint_that_is_not_dense(
    tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    folder = save_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    monkeypatch.setattr(sources, "_load_pretrained", must_not_happen("the model was loaded"))
    with pytest.raises(TargetError, match=message):
        load_causal_lm(str(folder))


def test_an_empty_quantization_config_is_none(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert equal_states(load_causal_lm(str(folder))[0].state_dict(), tiny_llama().state_dict())


def test_a_merged_checkpoint_is_dense_again(tmp_path: Path):
    model = tiny_llama()
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    folder = save_checkpoint(tmp_path / "model", hf_lowrank.merge(model))
    assert equal_states(load_causal_lm(str(folder))[0].state_dict(), model.state_dict())


def test_sources_on_the_hub_have_an_id(tmp_path: Path):
    assert hub_id("acme/dense") == "acme/dense"
    assert hub_id("demo") == DEMO_HUB_ID
    assert hub_id(str(tmp_path)) is None
    assert hub_id("folder/model.gguf") is None

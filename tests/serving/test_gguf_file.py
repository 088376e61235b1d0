"""GGUF files, read back by the gguf package: metadata, tensors, tokenizer."""

import json

import numpy as np
import pytest
import torch
from tokenizers.normalizers import NFC
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank.errors import ConfigError
from hf_lowrank.serving import gguf_file
from hf_lowrank.serving.gguf_file import check_llama, write_gguf
from tests.scripts import word_tokenizer
from tests.serving.exports.checkpoints import LLAMA, LLAMA_3, byte_tokenizer
from tests.tiny_models import build, tiny_gpt2, tiny_llama

gguf = pytest.importorskip("gguf", reason="an extra, part of dev")


def llama(**changes):
    return build(LlamaForCausalLM, LlamaConfig(**{**LLAMA, **changes}), seed=0).eval()


def narrow_first_block(model, width=72):
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(model.model.layers[0].mlp, name)
        weight = layer.weight[:, :width] if name == "down_proj" else layer.weight[:width]
        layer.weight = torch.nn.Parameter(weight.detach().clone())
    return model


@pytest.fixture
def written(tmp_path):
    def write(model, dtype=torch.float32, **settings):
        path = tmp_path / "model.gguf"
        write_gguf(model, byte_tokenizer(**settings), path, dtype)
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: tensor for tensor in reader.tensors}

    return write


def test_equal_widths_make_a_llama(written):
    fields, tensors = written(llama())
    assert fields["general.architecture"] == "llama"
    assert fields["llama.feed_forward_length"] == 192
    assert fields["llama.attention.head_count"] == 4
    assert fields["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert "output.weight" not in tensors  # tied


def test_uneven_widths_make_a_deci_with_a_number_for_each_block(written):
    model = narrow_first_block(llama())
    fields, tensors = written(model)
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [72, 192]
    assert fields["deci.attention.head_count"] == [4, 4]
    assert fields["deci.attention.head_count_kv"] == [2, 2]
    down = tensors["blk.0.ffn_down.weight"].data
    assert np.array_equal(down, model.model.layers[0].mlp.down_proj.weight.detach().numpy())


def test_what_is_rotated_together_stands_side_by_side(written):
    model = llama()
    _, tensors = written(model)
    weight = model.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    stored = tensors["blk.1.attn_k.weight"].data
    assert np.array_equal(stored[0], weight[0])
    assert np.array_equal(stored[1], weight[16])  # half of a head of 32
    assert np.array_equal(stored[2], weight[1])
    assert np.array_equal(stored[33], weight[48])


def test_stretched_positions_become_factors_of_the_frequencies(written):
    _, tensors = written(llama(rope_parameters=LLAMA_3))
    factors = tensors["rope_freqs.weight"].data
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)
    assert "rope_freqs.weight" not in written(llama())[1]


def test_half_precision_leaves_norms_as_they_are(written):
    model = llama(tie_word_embeddings=False).to(torch.bfloat16)
    fields, tensors = written(model, torch.bfloat16)
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    assert tensors["output.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize(("digits", "name"), [(False, "gpt-2"), (True, "smollm")])
def test_the_tokenizer_is_in_the_file(written, digits, name):
    tokenizer = byte_tokenizer(digits=digits)
    fields, _ = written(llama(vocab_size=324), digits=digits)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == name
    words = fields["tokenizer.ggml.tokens"]
    assert words[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert words[-1] == "[PAD323]"
    kinds = fields["tokenizer.ggml.token_type"]
    assert (kinds[1], kinds[9]) == (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    assert kinds[-1] == gguf.TokenType.UNUSED
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny_gpt2, "is a gpt2 model; only Llama models become .gguf files"),
        (lambda: tiny_llama(mlp_bias=True), "has biases or an activation other than silu"),
        (lambda: tiny_llama(rope_parameters={**LLAMA_3, "rope_type": "yarn"}), "rope_type 'yarn'"),
    ],
)
def test_a_model_that_is_not_known_is_refused(model, message):
    with pytest.raises(ConfigError, match=f"^here: .*{message}"):
        check_llama("here", model(), byte_tokenizer())


def test_a_tokenizer_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"byte-level BPE that llama\.cpp calls gpt-2 and smollm"):
        check_llama("here", tiny_llama(), word_tokenizer())
    assert gguf_file._split(byte_tokenizer()) == "gpt-2"
    rewriting = byte_tokenizer()
    rewriting.backend_tokenizer.normalizer = NFC()
    with pytest.raises(ConfigError, match="has a tokenizer other than"):
        check_llama("here", tiny_llama(), rewriting)


def test_tokens_without_an_embedding_are_refused():
    tokenizer = byte_tokenizer()
    check_llama("here", llama(vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(ConfigError, match=r"has tokens beyond its .* embeddings"):
        check_llama("here", llama(vocab_size=len(tokenizer) - 1), tokenizer)

"""Llama models as GGUF files for llama.cpp: dense, or with feed-forwards that lost channels.

llama.cpp's graph of the architecture `llama` has one width for all feed-forwards, that of `deci`
(made for NVIDIA's pruned Llamas) one for each block. Neither knows a layer of two factors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.errors import ConfigError
from hf_lowrank.format.layout import Layout

# Ways to split text before byte pairs are joined: the part of tokenizer.json, and llama.cpp's name.
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLITS = (("gpt-2", _BYTES), ("smollm", {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]}))
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ROTATED = (".q_proj.weight", ".k_proj.weight")
_SCALINGS = ("default", "llama3", "linear")


def check_plain_layers(source: str, layout: Layout) -> None:
    """Refuses layers that llama.cpp has no graph for, by what config.json says of them.

    Raises:
        ConfigError: With the first such layer, and what to do.
    """
    ranks = [name for name, rank in layout.ranks.items() if rank is not None]
    if names := [*ranks, *layout.quantized, *layout.experts]:
        raise ConfigError(
            f"{source}: {names[0]} is low-rank, quantized or a smaller expert, for which llama.cpp "
            "has no graph; compress with --channels_only (and quantize the .gguf file), or save "
            "what hf_lowrank.merge returns, which is dense and as large as before."
        )


def check_llama(source: str, model: Any, tokenizer: Any) -> None:  # noqa: ANN401
    """Refuses a model or a tokenizer that this writer does not know.

    Raises:
        ConfigError: With the reason.
    """
    config = model.config
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    reason = None
    if config.model_type != "llama":
        reason = f"is a {config.model_type} model; only Llama models become .gguf files"
    elif config.hidden_act != "silu" or config.attention_bias or config.mlp_bias:
        reason = "has biases or an activation other than silu, which are not written"
    elif scaling not in _SCALINGS:
        reason = f"has rope_type {scaling!r}; written are {', '.join(_SCALINGS)}"
    elif _split(tokenizer) is None:
        known = " and ".join(name for name, _ in _SPLITS)
        reason = f"has a tokenizer other than the byte-level BPE that llama.cpp calls {known}"
    elif max(tokenizer.get_vocab().values()) >= config.vocab_size:
        reason = f"has tokens beyond its {config.vocab_size} embeddings, which would be lost"
    if reason:
        raise ConfigError(f"{source}: {reason}; serve it with another engine, see docs/serving.md.")


def _split(tokenizer: Any) -> str | None:  # noqa: ANN401
    """llama.cpp's name of how a tokenizer splits text; None for an unknown one."""
    parts = _parts(tokenizer)
    model = parts.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback") or parts.get("normalizer"):
        return None
    found = parts.get("pre_tokenizer")
    return next((name for name, known in _SPLITS if known == found), None)


def _parts(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {} if backend is None else dict(json.loads(backend.to_str()))


def write_gguf(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    path: Path,
    dtype: torch.dtype,
) -> None:
    """Writes a Llama model and its tokenizer as one file.

    Args:
        model: Dense, or with narrowed feed-forwards; see `check_llama`.
        tokenizer: Its tokenizer, a byte-level BPE.
        path: Where to.
        dtype: Of matrices; norms are float32.
    """
    import gguf

    config = model.config
    widths = [layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers]
    is_uneven = len(set(widths)) > 1
    name = "deci" if is_uneven else "llama"
    blocks = len(widths)

    def each(value: int) -> int | list[int]:  # deci reads lists, one entry for each block
        return [value] * blocks if is_uneven else value

    writer = gguf.GGUFWriter(path, name)
    writer.add_name(Path(config.name_or_path).name or "model")
    writer.add_block_count(blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths if is_uneven else widths[0])
    writer.add_head_count(each(config.num_attention_heads))
    writer.add_head_count_kv(each(config.num_key_value_heads))
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(
        gguf.LlamaFileType[f"MOSTLY_{_TYPES[dtype]}".replace("MOSTLY_F32", "ALL_F32")]
    )
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], blocks)
    for key, weight in _tensors(model):
        kind = gguf.GGMLQuantizationType[_TYPES[dtype] if weight.ndim > 1 else "F32"]
        values = gguf.quants.quantize(weight.float().numpy(), kind)
        stored = names.get_name(key, try_suffixes=(".weight",)) or key
        writer.add_tensor(stored, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ANN401
    """What is stored, under transformers' names; rows of q and k in llama.cpp's order.

    There the two numbers that are rotated together stand side by side, not half a head apart.
    """
    config = model.config
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(_ROTATED):
            heads = weight.shape[0] // config.head_dim
            parts = weight.view(heads, 2, config.head_dim // 2, -1)
            weight = parts.transpose(1, 2).reshape(weight.shape)
        yield name, weight.detach()
    steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    plain = config.rope_parameters["rope_theta"] ** -steps
    factors = plain / model.model.rotary_emb.inv_freq
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-4):
        yield "rope_freqs.weight", factors


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:  # noqa: ANN401
    import gguf

    words = {index: word for word, index in tokenizer.get_vocab().items()}
    special = {i: token.special for i, token in tokenizer.added_tokens_decoder.items()}
    kinds = []
    for index in range(size):
        if index not in words:
            words[index] = f"[PAD{index}]"
            kinds.append(gguf.TokenType.UNUSED)
        elif index in special:
            user = gguf.TokenType.USER_DEFINED
            kinds.append(gguf.TokenType.CONTROL if special[index] else user)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    merges = _parts(tokenizer)["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(tokenizer))
    writer.add_token_list([words[index] for index in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    for role in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)

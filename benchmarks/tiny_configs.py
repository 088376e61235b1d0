"""Any model type of transformers, tiny: its default config with each size replaced by a small one.

Sizes are recognized by the names of the config's fields, so that a new model type needs no entry;
`_OVERRIDES` holds what the names do not tell.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

VOCABULARY = 99
HIDDEN = 32
HEADS = 4
HEAD_DIM = 8
POSITIONS = 64
_LARGEST = 20_000_000  # parameters of a model that is still small

# Field names, in full; the first that matches gives the largest value that is left.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"ngram_vocab_size_base|encoder_hash_byte_group_vocab|entity_vocab_size|num_hash_buckets", 97),
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"type_vocab_size", 4),
    (r"hidden_size_per_layer_input|laurel_rank|.*lora_rank|hc_lowrank|.*_rank|d_rel", 8),
    (r"(moe|shared_expert|shared_experts|moe_shared_expert|expert)_.*(intermediate|hidden).*", 24),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|mlp_dim)(_.*)?", 48),
    (r"d_inner|n_inner|hidden_dim|feed_forward_size|decoder_hidden_dim", 48),
    (r"linear_num_key_heads|swa_num_key_value_heads|(.*_)?num_(key_value|kv)_heads", 2),
    (r"(linear_num_value|attention|index_n|num|n)_(heads?)|num_attention_heads", HEADS),
    (r".*_attention_heads|linear_num_heads|o_groups|num_heads_ipa", HEADS),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r".*head_dim|dim_head|d_kv|d_head|kv_channels|attention_head_size|mamba_d_head", HEAD_DIM),
    (r"query_pre_attn_scalar|rotary_dim|.*state_size|mamba_d_state", HEAD_DIM),
    (r"mamba_d_ssm", 64),
    (r"num_kv_shared_layers", 0),
    (r"max_window_layers|depth|num_blocks|num_self_attends_per_block|moe_k|moe_topk", 2),
    (r"num_experts_per_tok|num_experts_per_token", 2),
    (r"(n_group|topk_group|n_groups|mamba_n_groups|first_k_dense_replace|num_global_layers)", 1),
    (r"(.*_)?(num_hidden_layers|layers?|num_layers|n_layer)", 2),
    (r".*(experts|expert_num)", 4),
    (r"max_2d_position_embeddings", 1024),
    (r".*(max_|original_max_).*position_embeddings|n_positions|n_ctx|max_seq_len", POSITIONS),
    (r"max_(source|target)_positions|context_length|num_position_embeddings", POSITIONS),
    (r"sliding_window(_size)?|attention_window(_size)?|keep_window_size|index_topk", 8),
    (r"num_landmarks|segment_means_seq_len", 4),
    (r"coordinate_size|shape_size", 4),
    (r"(.*_)?(hidden_size|hidden_size_global|backbone_hidden_size)|d_model|n_embd", HIDDEN),
    (
        r"(.*_)?(embedding_size|embed_dim|emb_dim|embedding_dim)|dim|d_latents|hidden_channels",
        HIDDEN,
    ),
    (r".*(output|input|out|in)_dims?|num_latents|entity_emb_size|embedding_rank", HIDDEN),
    (
        r"ext_pw_out_channel|depthwise_separable_out_channel|nemo_conv_channels|classifier_proj.*",
        32,
    ),
    (r"codebook_size|base_channels", 32),
    (r"seed|.*_token_(id|index)", 10**9),
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_KINDS = "layer_types", "layers_block_type", "mlp_layer_types", "block_types"
_SPREAD = {"initializer_range": 0.2, "init_std": 0.2, "initializer_factor": 1.0}
# What a type's field names do not tell: values by model type.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},
    "bros": {"hidden_size": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 99},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "mamba2": {"num_heads": 8},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "neomme": {"head_dim": 16},
    "perceiver": {"max_position_embeddings": 12},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 4},
    },
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"num_heads": 2, "hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
}


def tiny_config(config_class: Any) -> Any:  # noqa: ANN401
    """A config of the class with small sizes, a vocabulary of 99, and two layers.

    It has as many layers as kinds of them where these are more than two.
    """
    config = config_class(**_small_fields(config_class))
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def tiny_model(model_class: Any, config: PretrainedConfig, seed: int = 0) -> Any:  # noqa: ANN401
    """A model in eval mode whose every parameter is random, so that losing one shows.

    Raises:
        ValueError: Some size was not recognized: it would have more than 20 million parameters.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"still has {size:,} parameters")
    torch.manual_seed(seed)
    model: nn.Module = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _small_fields(config_class: Any) -> dict[str, Any]:  # noqa: ANN401
    """The fields of a config that differ from the defaults, parts of the config included."""
    default = config_class()
    fields: dict[str, Any] = {}
    ids = iter(range(VOCABULARY - 1, 0, -1))
    for field in dataclasses.fields(config_class):
        value = field.default
        if field.name in _TOKENS and value is not None:
            fields[field.name] = _TOKENS[field.name]
        elif field.name in _SPREAD and isinstance(value, float):
            fields[field.name] = _SPREAD[field.name]
        elif isinstance(value, int) and not isinstance(value, bool):
            is_token = re.search(r"token_(id|index)$", field.name) and value >= VOCABULARY
            small = next(ids) if is_token else _small(field.name, value)
            if small != value:
                fields[field.name] = small
    for name, part in (config_class.sub_configs or {}).items():
        own = getattr(default, name, None)
        if isinstance(own, PretrainedConfig) and part is not config_class:
            fields[name] = {"model_type": own.model_type} | _small_fields(type(own))
    fields |= _layer_kinds(default, {field.name for field in dataclasses.fields(config_class)})
    _attention({field.name: field.default for field in dataclasses.fields(config_class)}, fields)
    return fields | _OVERRIDES.get(config_class.model_type, {})


def _small(name: str, value: int) -> int:
    for pattern, largest in _SIZES:
        if re.fullmatch(pattern, name):
            return min(value, largest)
    return value


def _layer_kinds(default: Any, names: set[str]) -> dict[str, Any]:  # noqa: ANN401
    """One layer of each kind where the default config names the kinds of its layers."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {name: getattr(default, name, None) for name in _KINDS if name in names}
    found = {
        name: list(dict.fromkeys(kinds))
        for name, kinds in lists.items()
        if isinstance(kinds, (list, tuple)) and len(kinds) == count
    }
    if not found:
        return {}
    number = max(2, *map(len, found.values()))
    cycled = {name: [kinds[i % len(kinds)] for i in range(number)] for name, kinds in found.items()}
    return {"num_hidden_layers": number} | cycled


def _attention(defaults: dict[str, Any], fields: dict[str, Any]) -> None:
    """Where keys have as many heads as queries by default, they keep them; no size is left open."""
    keys, queries = "num_key_value_heads", "num_attention_heads"
    if queries in defaults and keys in defaults and defaults[keys] in (None, defaults[queries]):
        fields[keys] = fields.get(queries, defaults[queries])
    if defaults.get("head_dim", 0) is None and "qk_rope_head_dim" not in defaults:
        fields["head_dim"] = HEAD_DIM

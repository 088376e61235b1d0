"""Tiny mixtures of fused experts with random weights, one of each way to store and to route."""

from collections.abc import Callable
from typing import Any

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.tiny_models import LLAMA_LIKE, build, tiny_qwen2_moe

EXPERTS, WIDTH, CHOSEN = 6, 32, 2
SIZES = {**LLAMA_LIKE, "num_experts_per_tok": CHOSEN}


def mixtral(seed: int = 0) -> MixtralForCausalLM:
    """The weights of the chosen experts add up to 1."""
    sizes = SIZES | {"intermediate_size": WIDTH, "num_local_experts": EXPERTS}
    return build(MixtralForCausalLM, MixtralConfig(**sizes), seed)


def qwen3_moe(seed: int = 0) -> Qwen3MoeForCausalLM:
    """The same class of experts, under other names in a file."""
    sizes = SIZES | {"moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "head_dim": 8}
    return build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, norm_topk_prob=True), seed)


def olmoe(seed: int = 0) -> OlmoeForCausalLM:
    """Weights of the chosen experts as they are."""
    sizes = SIZES | {"intermediate_size": WIDTH, "num_experts": EXPERTS}
    return build(OlmoeForCausalLM, OlmoeConfig(**sizes), seed)


def gpt_oss(seed: int = 0) -> GptOssForCausalLM:
    """Transposed and interleaved weights, biases everywhere, a router with a bias."""
    sizes = SIZES | {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, "head_dim": 8}
    return build(GptOssForCausalLM, GptOssConfig(**sizes, sliding_window=8), seed)


def deepseek_v3(seed: int = 0) -> DeepseekV3ForCausalLM:
    """Sigmoid scores with a correction for the choice, and shared experts."""
    sizes = SIZES | {"moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS}
    sizes |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    config = DeepseekV3Config(**sizes, **ranks, v_head_dim=8, n_shared_experts=1)
    return build(DeepseekV3ForCausalLM, config, seed)


MIXTURES: dict[str, Callable[..., Any]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "qwen2_moe": tiny_qwen2_moe,
}

"""Writes compressed tiny checkpoints, and beside each the tokens that transformers writes with it.

python -m tests.serving.vllm_engine.checkpoints FOLDER

Run by `make test-vllm` in the project's own environment, since vLLM's has another transformers.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_lowrank import LowRankConfig, compress, load
from hf_lowrank.format.rebuild import compressed_layers
from tests.scripts import word_tokenizer
from tests.tiny_models import SPECIAL_TOKENS, VOCABULARY, build, token_batches, written_batches

EXPECTED = "expected.json"
DEMO = Path("outputs/demo")  # what `make demo` leaves; served, too, if it is there
NUM_PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 3, 12, 16
# Heads of 32 numbers, the smallest that vLLM's attention takes on a CPU.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    **SPECIAL_TOKENS,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BIASES = {"attention_bias": True, "mlp_bias": True}
GPT2 = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=64,
    n_embd=128,
    n_layer=2,
    n_head=4,
    initializer_range=0.1,
    **SPECIAL_TOKENS,
)
COMPACT = {"form": "compact", "channels": True}
FACTORS = {"form": "factors", "channels": True}
RANKS_ALONE = {"form": "compact", "channels": False}
# One of q, k and v stays dense.
MIXED = {"rank_pattern": {"model.layers.0.self_attn.v_proj": None}}

# name: (class, config, settings of the compression, kinds of layers that must be there)
CHECKPOINTS: dict[str, tuple[Any, Any, dict[str, Any], set[str]]] = {
    "llama_compact": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, **TIED),
        {**COMPACT, **MIXED},
        {"compact", "narrowed"},
    ),
    "llama_ranks": (LlamaForCausalLM, LlamaConfig(**SIZES, **UNTIED), RANKS_ALONE, {"compact"}),
    "llama_factors": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, **UNTIED, **BIASES),
        {**FACTORS, **MIXED},
        {"factors", "narrowed"},
    ),
    "llama_biases": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, **TIED, **BIASES),
        RANKS_ALONE,
        {"compact"},
    ),
    "llama_int8": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, **TIED),
        {**COMPACT, **MIXED, "weights": "int8"},
        {"compact", "narrowed", "quantized"},
    ),
    "llama_int4": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, **TIED),
        {**FACTORS, **MIXED, "weights": "int4"},
        {"factors", "narrowed", "quantized"},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, **TIED), COMPACT, {"compact", "narrowed"}),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(**SIZES, **UNTIED, head_dim=32),
        COMPACT,
        {"compact", "narrowed"},
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SIZES), RANKS_ALONE, {"compact"}),
    "gpt2": (GPT2LMHeadModel, GPT2, COMPACT, {"compact", "narrowed"}),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        RANKS_ALONE,
        {"compact"},
    ),
}


def write_checkpoint(folder: Path, name: str) -> None:
    """A compressed checkpoint, and what transformers makes of it."""
    model_class, config, settings, kinds = CHECKPOINTS[name]
    model = build(model_class, config, seed=0)
    compress(
        model,
        LowRankConfig(param_ratio=0.6, measured_prices=False, **settings),
        written_batches(model),
        progress=False,
    )
    found = {layer.form for layer in compressed_layers(model).values()}
    assert found == kinds, f"{name}: {found}"
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    write_expected(folder)


def write_expected(folder: Path) -> None:
    (folder / EXPECTED).write_text(as_json(load(folder, dtype=torch.float32)))


def as_json(model: Any) -> str:
    return json.dumps(expected(model))


@torch.no_grad()
def expected(model: Any) -> list[dict[str, Any]]:
    """Prompts, the tokens that a model puts behind each, and their log-probabilities."""
    found = []
    for batch in token_batches(NUM_PROMPTS, 1, PROMPT_LENGTH):
        tokens, scores = batch["input_ids"], []
        for _ in range(NEW_TOKENS):
            logits = model(tokens).logits[0, -1].log_softmax(-1)
            scores.append(logits.max().item())
            tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
        prompt, written = tokens[0].tolist()[:PROMPT_LENGTH], tokens[0].tolist()[PROMPT_LENGTH:]
        found.append({"prompt": prompt, "tokens": written, "scores": scores})
    return found


def main() -> None:
    root = Path(sys.argv[1])
    for name in CHECKPOINTS:
        if not (root / name / EXPECTED).exists():
            write_checkpoint(root / name, name)
    if DEMO.exists() and not (root / "demo").exists():
        shutil.copytree(DEMO, root / "demo")
        write_expected(root / "demo")


if __name__ == "__main__":
    main()

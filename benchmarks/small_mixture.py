"""A small mixture of experts, trained from scratch in minutes: its experts have learned to differ.

Random experts are all alike, so what a method leaves of them says little. The model has Qwen3-MoE's
architecture and nine million parameters, most of them in experts, and a byte-level BPE of its own.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,  # 1 / sqrt(hidden_size): with less, experts learn little in minutes
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
}
_CHARACTERS = 4_000_000  # of the text that the vocabulary is made from
_BYTES_PER_TOKEN = 5  # no text has more with such a vocabulary


def make_tokenizer(text: str, vocabulary: int) -> ByteLevelBPETokenizer:
    """Byte-level BPE of the start of a text."""
    tokenizer = ByteLevelBPETokenizer()
    lines = text[:_CHARACTERS].splitlines()
    tokenizer.train_from_iterator(lines, vocab_size=vocabulary, show_progress=False)
    return tokenizer


def windows_of(
    tokenizer: ByteLevelBPETokenizer, text: str, count: int, length: int
) -> torch.Tensor:
    """The first windows of a text, shape (count, length)."""
    ids = tokenizer.encode(text[: count * length * _BYTES_PER_TOKEN]).ids
    count = min(count, len(ids) // length)
    return torch.tensor(ids[: count * length]).reshape(count, length)


def train_mixture(
    windows: torch.Tensor, sizes: dict[str, Any], *, batch: int, rate: float, seed: int
) -> tuple[Qwen3MoeForCausalLM, dict[str, Any]]:
    """A mixture trained for one pass over the windows in a random order, and how that went.

    AdamW, its rate rising over the first twentieth and falling along a cosine; with the balance
    loss of Qwen3-MoE.

    Args:
        windows: Tokens, shape (windows, length).
        sizes: Fields of its config.
        batch: Windows in each step.
        rate: Largest learning rate.
        seed: Of the start and of the order.
    """
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.randperm(len(windows)).split(batch)
    start, losses = time.perf_counter(), []
    for step, rows in enumerate(order):
        share = min((step + 1) / max(1, len(order) // 20), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = (
                rate * share * (0.05 + 0.475 * (1 + math.cos(math.pi * step / len(order))))
            )
        tokens = windows[rows]
        output = model(tokens, labels=tokens, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance = sizes["router_aux_loss_coef"] * float(output.aux_loss.detach())
        losses.append(float(output.loss.detach()) - balance)
        if step % 25 == 0:
            print(f"step {step}/{len(order)}: loss {losses[-1]:.3f}", flush=True)
    last = losses[-20:]
    return model.eval(), {
        "steps": len(order),
        "tokens": windows.numel(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "last_loss": sum(last) / len(last),
        "seconds": time.perf_counter() - start,
    }


def read(path: str) -> str:
    """A text file."""
    return Path(path).read_text("utf-8")

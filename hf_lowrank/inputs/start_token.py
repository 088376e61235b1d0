"""The start token that a tokenizer puts before a text, and texts encoded with it."""

from __future__ import annotations

from typing import Any

import torch

_PROBE = "a"


def start_tokens(tokenizer: Any) -> list[int]:  # noqa: ANN401
    """Ids that a tokenizer puts before every text; most often one, or none.

    The tokenizer itself is asked: what does it add before a text that it would otherwise leave as
    it is? That is a start if the `bos_token` is part of it (Llama, Gemma; RoBERTa, whose training
    windows began with it), or if nothing is added behind (GLM's `[gMASK]<sop>`). A wrap around a
    whole sentence, such as BERT's `[CLS] ... [SEP]` or mBART's language code, is no start, as a
    window is no whole sentence; nor is an end token alone (T5). What is added behind is never used.

    Args:
        tokenizer: A transformers tokenizer.
    """
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(_PROBE, add_special_tokens=True)["input_ids"])
    places = range(len(full) - len(plain) + 1)
    begin = next((i for i in places if full[i : i + len(plain)] == plain), 0)
    before, behind = full[:begin], full[begin + len(plain) :]
    is_start = getattr(tokenizer, "bos_token_id", None) in before or not behind
    return before if is_start else []


def start_text(tokenizer: Any) -> str | None:  # noqa: ANN401
    """The start token as it is written, for reports; None where there is none."""
    return "".join(tokenizer.convert_ids_to_tokens(start_tokens(tokenizer))) or None


def encode_prompt(tokenizer: Any, prompt: str) -> torch.Tensor:  # noqa: ANN401
    """Ids of a text that a model is to continue, shape (1, tokens): the start token, no end token.

    Without any token in the text, shape (1, 0).
    """
    tokens = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not tokens:
        return torch.empty(1, 0, dtype=torch.long)
    return torch.tensor([start_tokens(tokenizer) + tokens])

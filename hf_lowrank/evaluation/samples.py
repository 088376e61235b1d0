"""What a language model writes after a few prompts, so that two models can be read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.start_token import encode_prompt
from hf_lowrank.report.sections import Sample

NEW_TOKENS = 40


def continue_prompts(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    prompts: Sequence[str],
    max_new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """The greedy continuation of each prompt, without the prompt.

    Where the tokenizer has a start token, each prompt begins with it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue.
        max_new_tokens: Tokens to add at most.

    Raises:
        DataError: A prompt has no tokens.
    """
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = end[0] if isinstance(end, list) else end
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=0 if padding is None else padding,
    )
    device = next(model.parameters()).device
    texts = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt).to(device)
        if ids.shape[1] == 0:
            raise DataError(f"sample_prompt {prompt!r} has no tokens; give another one.")
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def side_by_side(
    prompts: Sequence[str], dense: Sequence[str], compressed: Sequence[str]
) -> list[Sample]:
    """What the two models wrote, for the report."""
    return [Sample(*texts) for texts in zip(prompts, dense, compressed, strict=True)]

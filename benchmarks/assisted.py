"""Assisted generation: the compressed model drafts, its dense original checks.

Leviathan et al., Fast Inference from Transformers via Speculative Decoding, ICML 2023.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowrank.cli.arguments import SAMPLE_PROMPTS
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.inputs.sources import load_any_causal_lm
from hf_lowrank.inputs.start_token import encode_prompt
from hf_lowrank.report.provenance import write_result


@dataclass
class AssistedArguments:
    """Arguments of the comparison of plain with assisted generation."""

    model: str = option("outputs/demo", "Compressed model, which drafts: folder or Hub id.")
    baseline: str = option("demo", "Dense model, which checks.")
    new_tokens: int = option(64, "Tokens after each of the two sample prompts.")
    dtype: str = option("auto", "auto (as stored), float32, bfloat16 or float16.")
    output: str = option("outputs/assisted.json", "JSON file with the result.")


@dataclass(frozen=True)
class Assisted:
    """What drafting did over all prompts.

    Attributes:
        new_tokens: Tokens that were generated.
        rounds: Forward passes of the checking model; each adds the accepted drafts and one token.
        drafted: Tokens that the assistant proposed.
        accepted: Proposed tokens that were kept.
        plain_seconds: Seconds of the checking model alone.
        assisted_seconds: Seconds of both together.
        same_tokens: Share of prompts with the same tokens either way; greedy generation differs
            only where rounding turns a tie.
    """

    new_tokens: int
    rounds: int
    drafted: int
    accepted: int
    plain_seconds: float
    assisted_seconds: float
    same_tokens: float

    @property
    def acceptance_rate(self) -> float:
        """Accepted / proposed tokens; 0 where nothing was proposed."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def speed_up(self) -> float:
        """Seconds alone / seconds together."""
        return self.plain_seconds / self.assisted_seconds

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data."""
        return asdict(self) | {"acceptance_rate": self.acceptance_rate, "speed_up": self.speed_up}


def measure_assisted(
    model: nn.Module,
    assistant: nn.Module,
    prompts: Sequence[torch.Tensor],
    new_tokens: int = 40,
) -> Assisted:
    """Greedy generation of each prompt alone and with an assistant, in turn.

    Args:
        model: The dense causal language model.
        assistant: A model with the same tokenizer, for example the compressed one.
        prompts: Token ids of each prompt, shape (1, length).
        new_tokens: Tokens to add; the end of the text is not allowed before that.

    Raises:
        ConfigError: The models do not share a vocabulary.
        DataError: There is no prompt.
    """
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (model, assistant)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"The assistant has {sizes[1]} tokens, the model {sizes[0]}; they need the same "
            "tokenizer."
        )
    if not prompts:
        raise DataError("Assisted generation needs a prompt.")
    generate(model, prompts[0], 2)  # not counted: the first call is slower
    generate(model, prompts[0], 2, assistant)
    plain_seconds = assisted_seconds = 0.0
    same = 0
    counts = [0, 0]
    for prompt in prompts:
        start = time.perf_counter()
        plain = generate(model, prompt, new_tokens)
        middle = time.perf_counter()
        with _forward_calls(model, counts, 0), _forward_calls(assistant, counts, 1):
            assisted = generate(model, prompt, new_tokens, assistant)
        plain_seconds += middle - start
        assisted_seconds += time.perf_counter() - middle
        same += torch.equal(plain, assisted)
    rounds, drafted = counts
    share = same / len(prompts)
    seconds = (plain_seconds, assisted_seconds)
    total = new_tokens * len(prompts)
    return Assisted(total, rounds, drafted, total - rounds, *seconds, share)


def compare_assisted(args: AssistedArguments) -> None:
    """Times the baseline alone and with the model's drafts, and writes both down."""
    model, tokenizer = load_any_causal_lm(args.model, args.dtype)
    baseline, _ = load_any_causal_lm(args.baseline, args.dtype)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in SAMPLE_PROMPTS]
    found = measure_assisted(baseline, model, prompts, args.new_tokens)
    print(
        f"{found.acceptance_rate:.1%} of the drafts accepted, speed-up {found.speed_up:.2f} over "
        f"{found.new_tokens} tokens"
    )
    write_result(Path(args.output), {"arguments": vars(args), "assisted": found.to_dict()})


@torch.no_grad()
def generate(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, assistant: nn.Module | None = None
) -> torch.Tensor:
    """Greedy continuation, the prompt included; shape (1, length).

    Args:
        model: A causal language model.
        prompt: Token ids, shape (1, length).
        new_tokens: Tokens to add; the end of the text is not allowed before that.
        assistant: Model that drafts, if any.
    """
    ids = prompt.to(next(model.parameters()).device)
    output: torch.Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        assistant_model=assistant,
    )
    return output.cpu()


@contextmanager
def _forward_calls(model: nn.Module, counts: list[int], index: int) -> Iterator[None]:
    """Counts a model's forward passes: rounds of the checker, tokens of the assistant."""

    def count(*args: object) -> None:
        counts[index] += 1

    handle = model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()

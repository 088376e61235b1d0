"""Seconds of prefill and decode, several models in turn, so that a busy machine hits all alike."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.losses import eval_mode, is_causal_lm


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed.

    Attributes:
        batch_size: Sequences side by side.
        prompt_tokens: Tokens of each that are read at once.
        new_tokens: Tokens of each that are read one by one afterwards.
        repeats: Rounds; each times every model once.
        seed: Seed of the tokens.

    Raises:
        ConfigError: One of them is below 1.
    """

    batch_size: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the counts."""
        for name in ("batch_size", "prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Speed:
    """Seconds of one model.

    Attributes:
        settings: What was timed.
        prefill: Seconds to read the prompts, one of each round.
        decode: Seconds to read the new tokens one by one, one of each round.
    """

    settings: SpeedSettings
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Median seconds, and tokens per second by the medians."""
        prefill, decode = statistics.median(self.prefill), statistics.median(self.decode)
        size = self.settings.batch_size
        return {
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "prefill_tokens_per_second": size * self.settings.prompt_tokens / prefill,
            "decode_tokens_per_second": size * self.settings.new_tokens / decode,
        }


def measure_speed(
    models: Mapping[str, nn.Module], settings: SpeedSettings | None = None
) -> dict[str, Speed]:
    """Times causal language models on the same tokens.

    Every round times each model once, in an order that turns round by round; one round before
    that is not counted. The new tokens are given, not sampled, so all models do the same steps.

    Args:
        models: Model by name.
        settings: What to time.

    Raises:
        ConfigError: A model is no causal language model.
        DataError: The tokens are more than a model reads.
    """
    settings = settings or SpeedSettings()
    for name, model in models.items():
        _check_model(name, model, settings)
    rows = min(m.get_input_embeddings().weight.shape[0] for m in models.values())  # type: ignore[operator]
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, settings.prompt_tokens + settings.new_tokens)
    tokens = torch.randint(rows, shape, generator=generator)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    names = list(models)
    for turn in range(settings.repeats + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            found = time_once(models[name], tokens, settings.prompt_tokens)
            if turn:
                seconds[name].append(found)
    return {
        name: Speed(settings, tuple(p for p, _ in found), tuple(d for _, d in found))
        for name, found in seconds.items()
    }


@torch.no_grad()
def time_once(model: nn.Module, tokens: torch.Tensor, prompt_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decode, with the cache that `generate` uses by default.

    Args:
        model: A causal language model.
        tokens: Token ids, shape (batch, prompt and new tokens).
        prompt_tokens: How many of them are read at once.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    is_short = "logits_to_keep" in inspect.signature(model.forward).parameters
    last: dict[str, Any] = {"logits_to_keep": 1} if is_short else {}
    with eval_mode(model):
        start = _now(device)
        outputs = model(input_ids=tokens[:, :prompt_tokens], use_cache=True, **last)
        middle = _now(device)
        for step in range(prompt_tokens, tokens.shape[1]):
            outputs = model(
                input_ids=tokens[:, step : step + 1],
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )
        return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    """The clock, after everything that was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_model(name: str, model: nn.Module, settings: SpeedSettings) -> None:
    if not is_causal_lm(model):
        raise ConfigError(
            f"{name}: {type(model).__name__} is no causal language model, so it has no prefill and "
            "decode to time."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    length = settings.prompt_tokens + settings.new_tokens
    if limit is not None and length > limit:
        raise DataError(
            f"{name}: {settings.prompt_tokens} prompt and {settings.new_tokens} new tokens are "
            f"more than the model reads ({limit}); lower them."
        )

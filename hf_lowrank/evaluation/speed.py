"""Seconds of prefill and decode, several models in turn, so that a busy machine hits all alike."""

from __future__ import annotations

import inspect
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.measuring.items import eval_mode, is_causal_lm
from hf_lowrank.modeling.surgery import swapped
from hf_lowrank.report.provenance import device_name
from hf_lowrank.report.sections import Speed, SpeedConditions, Timing
from hf_lowrank.value_checks import check_count

REPORT_SECONDS = 20.0
Times = TypeVar("Times")
Opened = nn.Module | Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed.

    Attributes:
        batch_size: Sequences side by side.
        prompt_tokens: Tokens of each that are read at once.
        new_tokens: Tokens of each that are read one by one afterwards.
        repeats: Rounds; each times every model once.
        seed: Seed of the tokens.
        max_seconds: No further round begins after so many seconds, once one has been counted.

    Raises:
        ConfigError: One of the counts is below 1.
    """

    batch_size: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5
    seed: int = 0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        """Checks the counts."""
        for name in ("batch_size", "prompt_tokens", "new_tokens", "repeats"):
            check_count(name, getattr(self, name))


def measure_speed(
    models: Mapping[str, Opened],
    settings: SpeedSettings | None = None,
) -> dict[str, Timing]:
    """Times causal language models on the same tokens.

    Every round times each model once, in an order that turns round by round; one round before
    that is not counted. The new tokens are given, not sampled, so all models do the same steps.

    Args:
        models: Models by name, or functions returning a context manager that yields one; it is
            entered anew each round, outside the timing.
        settings: What to time.

    Raises:
        ConfigError: A model is no causal language model.
        DataError: The tokens are more than a model reads.
    """
    settings = settings or SpeedSettings()
    rows = []
    for name, each in models.items():
        with _opened(each) as model:
            _check_model(name, model, settings)
            rows.append(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, settings.prompt_tokens + settings.new_tokens)
    tokens = torch.randint(min(rows), shape, generator=generator)
    once = partial(time_once, tokens=tokens, prompt_tokens=settings.prompt_tokens)
    seconds = in_turn(models, once, settings.repeats, settings.max_seconds)
    return {name: _timing(settings, found) for name, found in seconds.items()}


def in_turn(
    models: Mapping[str, Opened],
    once: Callable[[nn.Module], Times],
    repeats: int,
    max_seconds: float | None = None,
) -> dict[str, list[Times]]:
    """Times of each round by model; every round times each model once, after one not counted.

    Args:
        models: As in `measure_speed`.
        once: Times a model.
        repeats: Rounds.
        max_seconds: No further round begins after so many seconds, once one has been counted.
    """
    found: dict[str, list[Times]] = {name: [] for name in models}
    names, begin = list(models), time.perf_counter()
    for turn in range(repeats + 1):
        limit = math.inf if max_seconds is None else max_seconds
        if turn > 1 and time.perf_counter() - begin > limit:
            break
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            with _opened(models[name]) as model:
                times = once(model)
            if turn:
                found[name].append(times)
    return found


def _timing(settings: SpeedSettings, seconds: Sequence[tuple[float, float]]) -> Timing:
    """The medians of seconds of prefill and decode, and tokens per second by them."""
    prefill, decode = (statistics.median(phase) for phase in zip(*seconds, strict=True))
    return Timing(
        prefill=tuple(each for each, _ in seconds),
        decode=tuple(each for _, each in seconds),
        prefill_seconds=prefill,
        decode_seconds=decode,
        prefill_tokens_per_second=settings.batch_size * settings.prompt_tokens / prefill,
        decode_tokens_per_second=settings.batch_size * settings.new_tokens / decode,
    )


def speed_before_and_after(
    model: nn.Module, originals: Mapping[str, nn.Module], settings: SpeedSettings | None = None
) -> Speed | None:
    """Speed of a compressed causal language model and of its dense self, for a report.

    The dense layers are put back for each dense round and taken out after it: no second model is
    in memory, and both are timed in turn.

    Args:
        model: The compressed model, as it is to be used.
        originals: Its dense layers by name, from `factorize_`.
        settings: What to time. By default no round begins after 20 seconds, once one is counted,
            and there are fewer tokens where the model reads fewer.

    Returns:
        The times of both, what was timed and where; None if the model can't be timed, then a
        warning says why.
    """

    def measure() -> Speed:
        chosen = settings or _settings_for(model)
        found = measure_speed(
            {"dense": partial(swapped, model, originals), "compressed": model}, chosen
        )
        rounds = len(found["dense"].prefill)
        conditions = SpeedConditions(**asdict(chosen), rounds=rounds, **where_timed(model))
        return Speed(found["dense"], found["compressed"], conditions)

    return unless_it_fails(measure)


def unless_it_fails(measure: Callable[[], Times]) -> Times | None:
    """What is measured; None where that fails, and a warning says why."""
    try:
        return measure()
    except Exception as error:  # a long compression is not lost because its speed is not known
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        warnings.warn(f"The speed was not measured: {reason}", stacklevel=3)
        return None


def where_timed(model: nn.Module) -> dict[str, Any]:
    """Device, hardware, threads and dtype, for a report of times."""
    weight = next(model.parameters())
    return {
        "device": str(weight.device),
        "hardware": device_name(weight.device),
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def _settings_for(model: nn.Module) -> SpeedSettings:
    """The default settings of a report, with fewer tokens where the model reads fewer."""
    wanted = SpeedSettings(max_seconds=REPORT_SECONDS)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit >= wanted.prompt_tokens + wanted.new_tokens:
        return wanted
    new_tokens = max(1, limit // 5)
    return replace(wanted, prompt_tokens=limit - new_tokens, new_tokens=new_tokens)


def _opened(model: Opened) -> AbstractContextManager[nn.Module]:
    return nullcontext(model) if isinstance(model, nn.Module) else model()


@torch.no_grad()
def time_once(model: nn.Module, tokens: torch.Tensor, prompt_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decode, with the cache that `generate` uses by default.

    Args:
        model: A causal language model.
        tokens: Token ids, shape (batch, prompt and new tokens).
        prompt_tokens: How many of them are read at once.

    Raises:
        ConfigError: The model hands no cache back.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    is_short = "logits_to_keep" in inspect.signature(model.forward).parameters
    last: dict[str, Any] = {"logits_to_keep": 1} if is_short else {}
    with eval_mode(model):
        start = now(device)
        outputs = model(input_ids=tokens[:, :prompt_tokens], use_cache=True, **last)
        middle = now(device)
        if getattr(outputs, "past_key_values", None) is None:
            raise ConfigError(
                f"{type(model).__name__} hands back no past_key_values, so it can't be read token "
                "by token."
            )
        for step in range(prompt_tokens, tokens.shape[1]):
            outputs = model(
                input_ids=tokens[:, step : step + 1],
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )
        return middle - start, now(device) - middle


def now(device: torch.device) -> float:
    """The clock, after everything that was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_model(name: str, model: nn.Module, settings: SpeedSettings) -> None:
    if not is_causal_lm(model):
        raise ConfigError(
            f"{name}: {type(model).__name__} is no causal language model, so it has no prefill and "
            "decode to time; leave the speed out."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    length = settings.prompt_tokens + settings.new_tokens
    if limit is not None and length > limit:
        raise DataError(
            f"{name}: {settings.prompt_tokens} prompt and {settings.new_tokens} new tokens are "
            f"more than the model reads ({limit}); lower them."
        )

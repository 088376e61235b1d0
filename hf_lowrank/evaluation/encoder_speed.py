"""Sentences per second of an encoder and of its dense self, in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_lowrank.evaluation.speed import in_turn, now, unless_it_fails, where_timed
from hf_lowrank.measuring.items import eval_mode
from hf_lowrank.modeling.surgery import swapped
from hf_lowrank.report.embedding_report import EncoderSpeed, EncoderTiming

# (sentences side by side, tokens of each)
SHAPES = ((1, 32), (1, 128), (32, 32), (32, 128))
ROUNDS = 5
SECONDS = 8.0  # no further round of a shape begins after so many


def encoder_speed(
    model: nn.Module,
    originals: Mapping[str, nn.Module],
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> EncoderSpeed | None:
    """Speed of a compressed encoder and of its dense self, for a report.

    Args:
        model: The compressed model.
        originals: Its dense layers by name, which are put back for each dense round.
        shapes: Sentences side by side and tokens of each; shapes with more tokens than the model
            reads are left out.

    Returns:
        The times; None if the model can't be timed on tokens, then a warning says why.
    """

    def measure() -> EncoderSpeed:
        limit = getattr(model.config, "max_position_embeddings", None)
        timings = [
            _timing(model, originals, size, tokens)
            for size, tokens in shapes
            if limit is None or tokens <= limit
        ]
        return EncoderSpeed(timings, **where_timed(model))

    return unless_it_fails(measure)


def _timing(
    model: nn.Module, originals: Mapping[str, nn.Module], size: int, tokens: int
) -> EncoderTiming:
    vocabulary: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(vocabulary), (size, tokens), generator=generator).to(vocabulary.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = in_turn(
        {"dense": partial(swapped, model, originals), "compressed": model},
        partial(_time_once, inputs=inputs),
        ROUNDS,
        SECONDS,
    )
    return EncoderTiming(size, tokens, tuple(found["dense"]), tuple(found["compressed"]))


@torch.no_grad()
def _time_once(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    device = inputs["input_ids"].device
    with eval_mode(model):
        start = now(device)
        model(**inputs)
        return now(device) - start

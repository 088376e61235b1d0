"""A model's outputs on a whole split, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from hf_lowrank.measuring.items import eval_mode
from hf_lowrank.tasks.task import Collator

_LABELS = {"labels", "start_positions", "end_positions"}


def collate_inputs(
    rows: list[dict[str, Any]],
    *,
    collator: Any,  # noqa: ANN401
) -> dict[str, torch.Tensor]:
    """A batch, padded by a collator with a tokenizer, of what the model takes and nothing else."""
    names = {*collator.tokenizer.model_input_names, *_LABELS}
    return dict(collator([{n: v for n, v in row.items() if n in names} for row in rows]))


@torch.no_grad()
def predictions(
    model: nn.Module, split: Dataset, collator: Collator, size: int = 64
) -> Iterator[tuple[Dataset, dict[str, torch.Tensor], Any]]:
    """Rows, their batch and the model's outputs in eval mode; short examples come first.

    Args:
        model: Transformers model; it sees no labels.
        split: Tokenized examples.
        collator: Makes batches of them.
        size: Examples in a batch.
    """
    device = next(model.parameters()).device
    lengths = [len(tokens) for tokens in split["input_ids"]]
    by_length = split.select(sorted(range(len(split)), key=lengths.__getitem__))
    with eval_mode(model):
        for start in range(0, len(by_length), size):
            rows = by_length.select(range(start, min(start + size, len(by_length))))
            batch = collator(rows.to_list())
            inputs = {n: value.to(device) for n, value in batch.items() if n not in _LABELS}
            yield rows, batch, model(**inputs)

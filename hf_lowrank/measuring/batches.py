"""Batches as users have them -> a list of dicts of tensors, read once and checked once.

Everything behind the entry trusts what `checked_batches` returns: the order is fixed, so losses
before and after a cut are paired by item; the first axis of every tensor is the batch; nothing is
null, text or empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_lowrank.errors import DataError
from hf_lowrank.measuring.items import Batch, is_causal_lm

# Axes of a single item, for rows that come without a batch axis.
_ITEM_AXES = {"input_ids": 1, "inputs_embeds": 2, "pixel_values": 3, "input_features": 2}
_SHARED_BY_ITEMS = ("attention_mask", "position_ids")  # may come with one row for all items
_MASKED = -1e4  # a float mask is added to the scores: at or below this, nothing is attended
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked_batches(
    batches: object, role: str, model: nn.Module, *, own_loss: bool = True
) -> list[Batch]:
    """Reads batches once, in one fixed order, and refuses what can't be worked with.

    Args:
        batches: Any iterable of dicts: a list, generator, DataLoader or `datasets.Dataset`. Values
            are tensors, arrays or nested lists of numbers. A row without a batch axis is a batch
            of one; integers become int64; one attention mask or one row of positions may stand
            for all items.
        role: What they are for, in messages, such as "calibration".
        model: The model that will read them.
        own_loss: Whether the model's own loss is taken, so that its inputs are known.

    Raises:
        DataError: With the batch, and where possible the column and the row.
    """
    if isinstance(batches, str | bytes | Mapping | torch.Tensor) or not isinstance(
        batches, Iterable
    ):
        raise DataError(
            f"{role}: expected a list of batches, each a dict of tensors such as input_ids; got "
            f"one {type(batches).__name__}."
        )
    checked: list[Batch] = []
    for index, batch in enumerate(batches):
        where = f"{role}, batch {index}"
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{where}: a batch is a dict of tensors by name; got a {type(batch).__name__}."
            )
        found = {str(k): _tensor(v, f"{where}: {str(k)!r}") for k, v in batch.items()}
        found = _same_size(found, where)
        if own_loss:
            _check_inputs(found, where, model)
        checked.append(found)
    return checked


def token_mask(batch: Batch) -> torch.Tensor | None:
    """Which tokens count, as booleans of the shape of the inputs; None if all do.

    Of a mask per query and key, shape (batch, heads, length, length), a token counts if it may
    attend to itself.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim < 4:
        return None if mask is None else mask.bool()
    return _attended(mask).diagonal(dim1=-2, dim2=-1)


def follows_from(batch: Batch) -> torch.Tensor | None:
    """Where the next token is to be predicted: it and this one count, and it may attend to this.

    Returns:
        Booleans of shape (batch, length - 1), or None if all are.
    """
    counted = token_mask(batch)
    if counted is None:
        return None
    both = counted[:, :-1] & counted[:, 1:]
    if batch["attention_mask"].ndim < 4:
        return both
    return both & _attended(batch["attention_mask"]).diagonal(offset=-1, dim1=-2, dim2=-1)


def num_tokens(batch: Batch) -> int:
    """How many tokens of a batch count; 0 where there are none, as with images."""
    mask = token_mask(batch)
    if mask is not None:
        return int(mask.sum())
    return (token_shape(batch) or torch.Size([0])).numel()


def token_shape(batch: Batch) -> torch.Size | None:
    """Shape of the tokens, (batch, length); None where a batch has none."""
    if "input_ids" in batch:
        return batch["input_ids"].shape
    return batch["inputs_embeds"].shape[:-1] if "inputs_embeds" in batch else None


def _attended(mask: torch.Tensor) -> torch.Tensor:
    """Whether any head lets a query see a key, shape (batch, length, length)."""
    seen = mask > _MASKED if mask.is_floating_point() else mask.bool()
    return seen.any(dim=1)


def _tensor(value: object, where: str) -> torch.Tensor:
    """A strided tensor of bool, int64 or a float type that layers take."""
    if not isinstance(value, torch.Tensor):
        value = _from_numbers(value.tolist() if isinstance(value, np.ndarray) else value, where)
    if value.layout != torch.strided or value.device.type == "meta":
        raise DataError(f"{where} is a {value.layout} tensor on {value.device}; pass its numbers.")
    if value.dtype == torch.bool:
        return value
    if not (value.is_floating_point() or value.is_complex()):
        return value.long()
    if value.dtype not in _FLOATS:
        raise DataError(
            f"{where} holds {value.dtype}, which no layer reads; convert it to the model's type."
        )
    return value.detach()


def _from_numbers(value: object, where: str) -> torch.Tensor:
    _check_leaves(value, where)
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{where} makes no tensor ({error}); pad its rows to one length.") from None


def _check_leaves(value: object, where: str, row: int | None = None) -> None:
    """Refuses everything but numbers; the row is the place on the outermost axis."""
    place = where if row is None else f"{where}, row {row},"
    if value is None:
        raise DataError(f"{place} is null; leave the row or the column out.")
    if isinstance(value, str | bytes):
        raise DataError(f"{place} holds text; tokenize it, or remove the column.")
    if isinstance(value, list | tuple):
        for index, each in enumerate(value):
            _check_leaves(each, where, index if row is None else row)
    elif not isinstance(value, bool | int | float | np.number | np.bool_):
        raise DataError(
            f"{place} holds a {type(value).__name__}; pass one tensor of shape (batch, ...)."
        )


def _same_size(batch: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Every tensor with the same number of items on its first axis."""
    if any(name in batch and batch[name].ndim == n for name, n in _ITEM_AXES.items()):
        batch = {name: value[None] for name, value in batch.items()}
    single = [name for name, value in batch.items() if value.ndim == 0]
    if single:
        raise DataError(f"{where}: {single[0]!r} is a single number; pass one for each item.")
    sizes = {name: len(value) for name, value in batch.items()}
    size = max(sizes.values(), default=0)
    batch = {
        name: value.expand(size, *value.shape[1:])
        if name in _SHARED_BY_ITEMS and len(value) == 1
        else value
        for name, value in batch.items()
    }
    if any(len(value) != size for value in batch.values()):
        raise DataError(f"{where}: its tensors have different numbers of items: {sizes}.")
    empty = [name for name, value in batch.items() if not value.numel()]
    if empty or not batch:
        raise DataError(f"{where} is empty ({', '.join(empty) or 'no tensor'}); leave it out.")
    return batch


def _check_inputs(batch: Batch, where: str, model: nn.Module) -> None:
    """Refuses tokens that the model can't read, and masks that don't fit them."""
    shape = token_shape(batch)
    if "input_ids" in batch and "inputs_embeds" in batch:
        raise DataError(f"{where} has both input_ids and inputs_embeds; a model takes one of them.")
    if "inputs_embeds" in batch and "labels" not in batch and is_causal_lm(model):
        raise DataError(
            f"{where} has inputs_embeds and no labels, so the next tokens are not known; add the "
            "token ids as labels."
        )
    if "input_ids" in batch:
        _check_vocabulary(batch["input_ids"], where, model)
    mask = batch.get("attention_mask")
    if shape is None or mask is None or mask.shape == shape:
        return
    if mask.ndim != 4 or (mask.shape[0], *mask.shape[2:]) != (*shape, shape[-1]):
        raise DataError(
            f"{where}: attention_mask has shape {tuple(mask.shape)}; tokens of shape "
            f"{tuple(shape)} need {tuple(shape)}, or (batch, heads or 1, length, length)."
        )
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise DataError(
            f"{where}: a 4-D attention_mask is boolean, or floats that are added to the scores (0 "
            f"or -inf); got {mask.dtype}."
        )
    if mask.is_floating_point() and bool((mask > 0).any()):
        raise DataError(
            f"{where}: a 4-D attention_mask of floats is added to the scores, 0 where a token is "
            f"attended and -inf elsewhere; got {float(mask.max())}."
        )


def _check_vocabulary(tokens: torch.Tensor, where: str, model: nn.Module) -> None:
    try:
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # CANINE hashes its tokens: any will do
        return
    size = getattr(embeddings, "num_embeddings", None)
    outside = (tokens < 0) | (tokens >= size) if size else torch.zeros(1, dtype=torch.bool)
    if bool(outside.any()):
        row = int(outside.nonzero()[0, 0])
        raise DataError(
            f"{where}, row {row}: token id {int(tokens[outside][0])} is outside the model's "
            f"vocabulary of {size}; use the model's own tokenizer."
        )

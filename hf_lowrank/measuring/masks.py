"""Which positions of an activation are padding."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lowrank.measuring.batches import token_mask, token_shape
from hf_lowrank.measuring.items import IGNORED, Batch, eval_mode, is_encoder_decoder
from hf_lowrank.measuring.projection import plain_forward

_DECODER_PADDING = {"labels": IGNORED, "decoder_input_ids": 0, "decoder_attention_mask": 0}
_FOLLOWS_LABELS: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class BatchMasks:
    """The masks of one batch.

    Attributes:
        batch_size: Its items.
        masks: Of the inputs, and of the decoder's positions where there is a decoder; True where
            a token counts, shape (batch, length).
    """

    batch_size: int = 1
    masks: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, batch: Batch, has_decoder: bool) -> BatchMasks:
        """The masks that a batch says or implies."""
        mask, shape = token_mask(batch), token_shape(batch)
        masks = [] if mask is None else [mask]
        if has_decoder and "labels" in batch:
            if mask is None and shape is not None:
                masks.append(batch["labels"].new_ones(shape, dtype=torch.bool))
            masks.append(batch["labels"] != IGNORED)
        return cls(len(next(iter(batch.values()))), tuple(masks))

    def mask_for(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """The mask of these positions; batch and choice axes may have been flattened."""
        positions = inputs.shape[:-1]
        for mask in self.masks:
            is_flat = len(positions) == 1 or positions[-1] == mask.shape[-1]
            if is_flat and positions.numel() == mask.numel():
                return mask.reshape(positions)
        return None


def separate_lengths(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Makes sure that encoder and decoder positions can be told apart by their number.

    Masks are matched to activations by shape, so equal lengths are ambiguous where the masks
    differ. One more ignored label at the end separates them; where the decoder has no position
    left for it, the last label is dropped instead. Decoders that are not as long as the labels
    keep theirs, which is tried once for each model.
    """
    labels = batch.get("labels")
    if not is_encoder_decoder(model) or labels is None or labels.shape != token_shape(batch):
        return batch
    config: Any = model.config
    limit = getattr(getattr(config, "decoder", config), "max_position_embeddings", None)
    limit = getattr(config, "max_decoder_position_embeddings", limit)  # LED's own name
    is_full = limit is not None and labels.shape[1] >= limit
    mask = token_mask(batch)
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    if is_full and torch.equal(mask, labels != IGNORED):
        return batch
    changed = dict(batch)
    for name, value in _DECODER_PADDING.items():
        if name in batch:
            change = (0, -1 if is_full else 1)
            changed[name] = torch.nn.functional.pad(batch[name], change, value=value)
    if model not in _FOLLOWS_LABELS:
        _FOLLOWS_LABELS[model] = _can_read(model, changed)
    return changed if _FOLLOWS_LABELS[model] else batch


@torch.no_grad()
def _can_read(model: nn.Module, batch: Batch) -> bool:
    """Whether the decoder is as long as the labels; some read the encoder's tokens once more."""
    try:
        with eval_mode(model):
            plain_forward(model)(**{name: value[:1] for name, value in batch.items()})
    except (RuntimeError, ValueError):
        return False
    return True

"""The loss of a model without a head: how far its output moves from what it was.

With e(x) the embedding and y = e(x) + u, u drawn from N(0, I), the loss |e(x) - y|^2 / 2 has the
gradient -J^T u. Summed over draws, its outer products are J^T J, the Gauss-Newton matrix of half
the squared change of the embedding. So prices are in units of that, 1 - cosine for normalised
embeddings, and nobody needs a label. See docs/embeddings.md, "What is measured".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.measuring.batches import token_mask, token_shape
from hf_lowrank.measuring.items import (
    Batch,
    ItemLosses,
    LossFunction,
    eval_mode,
    is_causal_lm,
    is_encoder_decoder,
    is_one_of,
    without_labels,
)
from hf_lowrank.value_checks import check_choice

POOLINGS = ("mean", "cls", "last", "output")
_OUTPUTS = ("text_embeds", "image_embeds")  # what models with projections hand back


def _bodies() -> frozenset[str]:
    entries = [*MODEL_MAPPING_NAMES.values(), *MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values()]
    names = [n for each in entries for n in ([each] if isinstance(each, str) else each)]
    projected = [
        name[: -len("Model")] + "ModelWithProjection" for name in names if name.endswith("Model")
    ]
    return frozenset(name for name in [*names, *projected] if "For" not in name)


_BODIES = _bodies()


@dataclass(frozen=True)
class EmbeddingLoss:
    """Half the squared distance to `labels`, the embeddings that a model should keep.

    Without labels they are drawn around the model's own embeddings, for the sake of the gradient.
    A `LossFunction`: give it to `compress` for another pooling than the default, or for a model
    whose class transformers does not know.

    Attributes:
        pooling: What of the output is the embedding: "mean" over the tokens that the attention
            mask leaves, "cls", the first position, "last", the last of these tokens, or "output",
            what the model itself pools or projects. None: "output" for images and for models with
            a projection, otherwise "mean".
        normalize: Whether embeddings are brought to length 1; the loss is then 1 - cosine.

    Raises:
        ConfigError: The pooling is unknown.
    """

    pooling: str | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        """Checks the pooling."""
        check_choice("pooling", self.pooling, (None, *POOLINGS))

    def __call__(self, model: nn.Module, batch: Batch) -> ItemLosses:
        """Losses of a batch, one for each item; see `LossFunction`.

        Raises:
            ConfigError: The model has no such output.
            DataError: The labels are no embeddings of these items.
        """
        found = self.embed(model, batch)
        labels = batch.get("labels")
        if labels is None:
            labels = found.detach() + torch.randn_like(found)
        if labels.shape != found.shape or not labels.is_floating_point():
            raise DataError(
                f"labels of shape {tuple(labels.shape)} are no embeddings: this model gives "
                f"{tuple(found.shape)}; leave them out, nothing needs them."
            )
        losses = (found - labels.float()).square().sum(dim=1) / 2
        return ItemLosses(losses, torch.ones(len(losses), dtype=torch.long, device=found.device))

    def embed(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Embeddings of a batch, fp32, shape (batch, size).

        Two embeddings of an item, as of a text and an image, stand side by side over sqrt(2), so
        that half their squared distance is the mean of 1 - cosine.

        Raises:
            ConfigError: The model has no such output.
        """
        if is_encoder_decoder(model):
            raise ConfigError(
                f"{type(model).__name__}: has an encoder and a decoder, so what its embedding is "
                "can't be known; load the encoder alone, or pass a loss_function."
            )
        return self.pooled(model, model(**without_labels(batch)), batch)

    def pooled(self, model: nn.Module, outputs: Any, batch: Batch) -> torch.Tensor:  # noqa: ANN401
        """The same from the model's outputs on the batch."""
        parts = [part.float() for part in self._parts(model, outputs, batch)]
        if self.normalize:
            parts = [F.normalize(part, dim=-1) for part in parts]
        return torch.cat(parts, dim=-1) / math.sqrt(len(parts))

    def _parts(self, model: nn.Module, outputs: Any, batch: Batch) -> Sequence[torch.Tensor]:  # noqa: ANN401
        """The embeddings among a model's outputs, each of shape (batch, size)."""
        if self.pooling in (None, "output"):
            own = [getattr(outputs, name, None) for name in _OUTPUTS]
            parts = [part for part in own if part is not None]
            pooled = getattr(outputs, "pooler_output", None)
            if not parts and pooled is not None and (self.pooling or token_shape(batch) is None):
                parts = [pooled.flatten(1)]
            if parts:
                return parts
        hidden = getattr(outputs, "last_hidden_state", None)
        if hidden is None or self.pooling == "output":
            wanted = "pooled output" if self.pooling == "output" else "last_hidden_state"
            raise ConfigError(
                f"{type(model).__name__} returns no {wanted}, so it has no embedding; choose "
                "another pooling, or pass a loss_function."
            )
        return [_pooled(hidden, token_mask(batch), self.pooling or "mean")]


def _pooled(hidden: torch.Tensor, counted: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """One vector for each item.

    Args:
        hidden: Shape (batch, length, size), or (batch, size, height, width) of convolutions.
        counted: Which positions count, shape (batch, length); None if all do.
        pooling: "mean", "cls" or "last".
    """
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if counted is None or counted.shape != hidden.shape[:2]:
        counted = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(counted, places, 0).amax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weights = counted.float()[..., None]
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)


def has_no_head(model: nn.Module) -> bool:
    """Whether transformers lists the model's class, or one above it, as one without a head."""
    return not is_causal_lm(model) and is_one_of(model, _BODIES)


def embedding_loss(model: nn.Module, loss_function: LossFunction | None) -> EmbeddingLoss | None:
    """The embedding loss that a run works with, None if its loss is another.

    Args:
        model: The model.
        loss_function: What the run was given.
    """
    if loss_function is None:
        return EmbeddingLoss() if has_no_head(model) else None
    return loss_function if isinstance(loss_function, EmbeddingLoss) else None


@torch.no_grad()
def with_embeddings(model: nn.Module, batches: Sequence[Batch], loss: EmbeddingLoss) -> list[Batch]:
    """The batches with the embeddings that the model gives now as labels, where they have none."""
    device = next(model.parameters()).device
    found: list[Batch] = []
    with eval_mode(model):
        for batch in batches:
            if "labels" not in batch:
                inputs = {name: value.to(device) for name, value in batch.items()}
                batch = {**batch, "labels": loss.embed(model, inputs).cpu()}
            found.append(batch)
    return found

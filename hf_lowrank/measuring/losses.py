"""The loss of a model's own task on a batch, item by item, whichever head it has."""

from __future__ import annotations

import torch
from torch import nn

from hf_lowrank.measuring.causal import causal_losses
from hf_lowrank.measuring.embeddings import EmbeddingLoss, has_no_head
from hf_lowrank.measuring.heads import head_losses, prepare_head
from hf_lowrank.measuring.items import (
    Batch,
    ItemLosses,
    LossFunction,
    device_of,
    eval_mode,
    is_causal_lm,
    is_encoder_decoder,
)
from hf_lowrank.measuring.own_loss import known_places
from hf_lowrank.measuring.projection import last_states, projection


def item_losses(model: nn.Module, batch: Batch, label_source: str = "data") -> ItemLosses:
    """Losses of a batch on a transformers model; differentiable unless grad is disabled.

    Args:
        model: A `PreTrainedModel`; of one without a head the loss is `EmbeddingLoss()`.
        batch: Inputs of the forward pass, on the model's device. Causal language models take their
            labels from `labels`, or from `input_ids` where `attention_mask` is 1; the others need
            `labels` (or `start_positions` and `end_positions`) unless they are sampled.
        label_source: "data", or "model" to sample the labels from the model's own predictions,
            which makes squared gradients an unbiased estimate of the Fisher information.

    Raises:
        ConfigError: The model has no output that a loss can be computed from; its own loss is
            another; or it writes text and is neither an encoder-decoder nor a causal language
            model that transformers lists.
        DataError: The batch lacks labels.
    """
    if is_causal_lm(model):
        return causal_losses(model, batch, sample=label_source == "model")
    if has_no_head(model):
        return EmbeddingLoss()(model, batch)
    return head_losses(model, batch, sample=label_source == "model")


def check_losses(model: nn.Module, batch: Batch, loss_function: LossFunction | None = None) -> None:
    """Measures one item, or a batch by a loss that is given, to refuse now what it would later.

    Raises:
        ConfigError, DataError: See `item_losses`, which is the loss where none is given.
    """
    device = device_of(model)
    with torch.no_grad(), eval_mode(model):
        few = {name: v[: None if loss_function else 1].to(device) for name, v in batch.items()}
        (loss_function or item_losses)(model, few)


def prepare_losses(model: nn.Module, batch: Batch) -> None:
    """Runs what `item_losses` has to find out once about a model, for callers that use hooks."""
    if is_causal_lm(model):
        projection(model, batch)
        known_places(model, batch)
    elif not has_no_head(model):
        prepare_head(model, batch)


def forward_body(model: nn.Module, batch: Batch) -> None:
    """Runs the layers on a batch for the sake of hooks, without head and loss where possible."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if is_causal_lm(model) and projection(model, batch) is not None:
        last_states(model, batch)
    else:
        model(**(batch if is_encoder_decoder(model) else inputs))

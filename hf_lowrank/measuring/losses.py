"""The loss of a model's own task on a batch, item by item, whichever head it has."""

from __future__ import annotations

from torch import nn

from hf_lowrank.measuring.causal import causal_losses, head_is_last, last_states
from hf_lowrank.measuring.heads import head_losses
from hf_lowrank.measuring.items import (
    Batch,
    ItemLosses,
    is_causal_lm,
    is_encoder_decoder,
)


def item_losses(model: nn.Module, batch: Batch, label_source: str = "data") -> ItemLosses:
    """Losses of a batch on a transformers model; differentiable unless grad is disabled.

    Args:
        model: A `PreTrainedModel` with a head.
        batch: Inputs of the forward pass, on the model's device. Causal language models take their
            labels from `labels`, or from `input_ids` where `attention_mask` is 1; the others need
            `labels` (or `start_positions` and `end_positions`) unless they are sampled.
        label_source: "data", or "model" to sample the labels from the model's own predictions,
            which makes squared gradients an unbiased estimate of the Fisher information.

    Raises:
        ConfigError: The model has no output that a loss can be computed from, or it writes text
            and is neither an encoder-decoder nor a causal language model that transformers lists.
        DataError: The batch lacks labels.
    """
    if is_causal_lm(model):
        return causal_losses(model, batch, sample=label_source == "model")
    return head_losses(model, batch, sample=label_source == "model")


def prepare_losses(model: nn.Module, batch: Batch) -> None:
    """Runs what `item_losses` has to find out once about a model, for callers that use hooks."""
    if is_causal_lm(model):
        head_is_last(model, batch)


def forward_body(model: nn.Module, batch: Batch) -> None:
    """Runs the layers on a batch for the sake of hooks, without head and loss where possible."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if is_causal_lm(model) and head_is_last(model, batch):
        last_states(model, batch)
    else:
        model(**(batch if is_encoder_decoder(model) else inputs))

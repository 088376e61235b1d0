"""Losses of the other heads: one for a sentence, for each token, or for a span."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.measuring.batches import token_mask
from hf_lowrank.measuring.items import (
    IGNORED,
    Batch,
    ItemLosses,
    config_of,
    cross_entropy,
    is_encoder_decoder,
    is_one_of,
    without_labels,
)
from hf_lowrank.measuring.own_loss import refusal_of_head

_SPAN_MODELS = frozenset(MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values())


def head_losses(model: nn.Module, batch: Batch, sample: bool) -> ItemLosses:
    """Loss of a task head, told apart by the model's class and the shape of its logits."""
    if is_one_of(model, _SPAN_MODELS):
        return _span_losses(model, batch, sample)
    labels = batch.get("labels")
    needs_labels = is_encoder_decoder(model)
    if not needs_labels and getattr(model, "can_generate", lambda: False)():
        raise ConfigError(
            f"{type(model).__name__} writes text, but is not among the causal language models of "
            "transformers, so its loss is not known; pass a loss_function."
        )
    if labels is None and (not sample or needs_labels):
        advice = "add them" if needs_labels else "add them or set label_source='model'"
        raise DataError(
            f"The batches have no 'labels', which {type(model).__name__} needs; {advice}."
        )
    refusal = prepare_head(model, batch)
    outputs = model(**(batch if needs_labels else without_labels(batch)))
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ConfigError(
            f"{type(model).__name__} returns no logits, so it has no loss; load the model with "
            "its task head, or pass loss_function=EmbeddingLoss() to keep its embeddings."
        )
    if refusal:
        raise ConfigError(refusal)
    labels = _any_labels(model, batch, logits) if labels is None else labels
    return _logit_losses(model, logits, labels, sample)


def prepare_head(model: nn.Module, batch: Batch) -> str:
    """Why a head's loss is not known, empty if it is; found out once for each model."""
    if is_one_of(model, _SPAN_MODELS) or (is_encoder_decoder(model) and "labels" not in batch):
        return ""  # the former have one kind of loss, the latter can't be run

    def compute(outputs: Any, few: Batch) -> tuple[Batch, ItemLosses]:  # noqa: ANN401
        labels = few.get("labels")
        labels = _any_labels(model, few, outputs.logits) if labels is None else labels
        return {**few, "labels": labels}, _logit_losses(model, outputs.logits, labels, False)

    return refusal_of_head(model, batch, compute)


def _any_labels(model: nn.Module, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Labels that the head could be given, ignored where the inputs are padding."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    if logits.ndim != 3:
        is_one_class = problem_type(model, logits, labels) == "single_label_classification"
        return labels if is_one_class else torch.zeros_like(logits)
    counted = token_mask(batch)
    return labels if counted is None else labels.masked_fill(~counted, IGNORED)


def _logit_losses(
    model: nn.Module, logits: torch.Tensor, labels: torch.Tensor, sample: bool
) -> ItemLosses:
    """A loss for each token or each sentence, as the shape of the logits says."""
    if logits.ndim == 3:
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), sample)
        return ItemLosses(losses.view(labels.shape).sum(1), (labels != IGNORED).sum(1))
    losses = _sentence_losses(model, logits, labels, sample)
    return ItemLosses(losses, torch.ones(len(losses), dtype=torch.long, device=losses.device))


def _sentence_losses(
    model: nn.Module, logits: torch.Tensor, labels: torch.Tensor, sample: bool
) -> torch.Tensor:
    logits = logits.float()
    problem = problem_type(model, logits, labels)
    if problem == "regression":
        if sample:  # a squared error is the log-likelihood of variance 1/2
            labels = logits.detach() + torch.randn_like(logits) * 0.5**0.5
        return _mean_of_terms((logits - labels.float().view_as(logits)) ** 2, sample)
    if problem == "multi_label_classification":
        labels = torch.bernoulli(logits.detach().sigmoid()) if sample else labels
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        return _mean_of_terms(losses, sample)
    return cross_entropy(logits, labels.view(-1).long(), sample)


def _mean_of_terms(losses: torch.Tensor, sample: bool) -> torch.Tensor:
    """Mean over the last dimension: of k log-likelihoods, each with a label of its own.

    Its curvature is the mean of theirs, but the expected square of its gradient, where labels are
    drawn, is their sum over k^2; so drawn losses are multiplied by sqrt(k).
    """
    return losses.mean(dim=-1) * (losses.shape[-1] ** 0.5 if sample else 1.0)


def problem_type(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> str:
    """The sentence-level task, found out as transformers' own heads do."""
    known: str | None = getattr(config_of(model), "problem_type", None)
    if known is not None:
        return known
    if logits.shape[-1] == 1:
        return "regression"
    is_integer = not labels.is_floating_point()
    return "single_label_classification" if is_integer else "multi_label_classification"


def _span_losses(model: nn.Module, batch: Batch, sample: bool) -> ItemLosses:
    """Extractive question answering; a position outside the text is ignored."""
    positions = ("start_positions", "end_positions")
    if not sample and not all(name in batch for name in positions):
        raise DataError(
            f"The batches have no {' and '.join(positions)}, which {type(model).__name__} needs; "
            "add them or set label_source='model'."
        )
    outputs = model(**{name: value for name, value in batch.items() if name not in positions})
    losses = []
    for name, logits in zip(positions, (outputs.start_logits, outputs.end_logits), strict=True):
        length = logits.shape[1]
        targets = batch[name].view(-1) if name in batch else logits.new_zeros(len(logits)).long()
        targets = targets.masked_fill((targets < 0) | (targets >= length), IGNORED)
        losses.append(cross_entropy(logits, targets, sample))
    total = _mean_of_terms(torch.stack(losses, dim=-1), sample)
    return ItemLosses(total, torch.ones(len(total), dtype=torch.long, device=total.device))

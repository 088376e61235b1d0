"""Tiny encoders with the heads of other tasks than classes of sentences, and rows for them."""

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from hf_lowrank.measuring.items import IGNORED
from tests.tiny_models import HIDDEN, INTERMEDIATE, SCALE, VOCABULARY, Batch, build, token_batches

# Name: (class, settings of its config)
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "value": (BertForSequenceClassification, {"num_labels": 1}),
    "values": (BertForSequenceClassification, {"num_labels": 3, "problem_type": "regression"}),
    "several labels": (
        BertForSequenceClassification,
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "tokens": (BertForTokenClassification, {"num_labels": 5}),
}


def tiny_head(name: str, seed: int = 0) -> nn.Module:
    """A model with one of `HEADS`."""
    model_class, settings = HEADS[name]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=SCALE,
        **settings,
    )
    return build(model_class, config, seed)


@torch.no_grad()
def head_batches(name: str, count: int = 4, seed: int = 0, labelled_by: int = 0) -> list[Batch]:
    """Sentences with padding, labelled by the model of a seed: damage to that one raises its loss.

    Of tokens, padding and every third one are ignored.
    """
    author, batches = tiny_head(name, labelled_by), []
    for batch in token_batches(count, 4, 12, padding=3, seed=seed):
        logits = author(**batch).logits
        if name == "tokens":
            labels = logits.argmax(dim=-1).masked_fill(batch["attention_mask"] == 0, IGNORED)
            labels[:, ::3] = IGNORED
        elif name == "several labels":
            labels = (logits > 0).float()
        else:
            labels = logits.squeeze(-1)
        batches.append({**batch, "labels": labels})
    return batches

"""Models with every kind of head, batches for them, and comparisons of losses."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from hf_lowrank.measuring.items import IGNORED
from tests.tiny_models import (
    HIDDEN,
    LLAMA_LIKE,
    VOCABULARY,
    build,
    sentence_batches,
    seq2seq_batches,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    token_batches,
)


def tiny_gemma2():
    """Logits soft-capped at 2."""
    config = Gemma2Config(
        **LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0
    )
    return build(Gemma2ForCausalLM, config, 0)


def tiny_granite():
    """Logits divided by 4."""
    return build(GraniteForCausalLM, GraniteConfig(**LLAMA_LIKE, logits_scaling=4.0), 0)


def tiny_cohere():
    """Logits multiplied by 1/4."""
    return build(CohereForCausalLM, CohereConfig(**LLAMA_LIKE, logit_scale=0.25), 0)


def tiny_bert(model_class, **changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        **changes,
    }
    return build(model_class, BertConfig(**settings), 0)


def tiny_bert_decoder():
    """A causal language model with a transform between hidden states and head."""
    return tiny_bert(BertLMHeadModel, is_decoder=True)


PLAIN_HEADS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}
CHANGED_LOGITS = {
    "gemma2": tiny_gemma2,
    "granite": tiny_granite,
    "cohere": tiny_cohere,
    "bert_decoder": tiny_bert_decoder,
}


def causal_batch(kind):
    """Tokens of three sequences, with what `kind` adds to them."""
    batch = token_batches(1, 3, 16, seed=5)[0]
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    if kind == "tokens":
        return {"input_ids": tokens}
    if kind == "right padding":
        tokens[1, -5:], mask[1, -5:] = 0, 0
    if kind == "left padding":
        tokens[2, :4], mask[2, :4] = 0, 0
    if kind == "labels":
        labels = tokens.clone()
        labels[0, 3:7], labels[2, :9], labels[1, -1] = IGNORED, IGNORED, IGNORED
        return {**batch, "labels": labels}
    return batch


def mean_of(result):
    return result.sums.sum() / result.counts.sum()


def body_gradients(model, loss):
    """Gradients by the matrices between embeddings and head."""
    body = {
        name: parameter
        for name, parameter in model.base_model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name
    }
    found = torch.autograd.grad(loss, list(body.values()), allow_unused=True)
    return {name: grad for name, grad in zip(body, found, strict=True) if grad is not None}


def assert_same_loss_and_gradient(model, found, wanted):
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    found_gradients, wanted_gradients = (body_gradients(model, loss) for loss in (found, wanted))
    assert wanted_gradients
    assert found_gradients.keys() == wanted_gradients.keys()
    assert max(float(gradient.abs().max()) for gradient in wanted_gradients.values()) > 1e-3
    for name, gradient in wanted_gradients.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(found_gradients[name], gradient, atol=1e-4 * scale + 1e-8), name


def generator():
    return torch.Generator().manual_seed(0)


def sentences(**labels):
    return {**token_batches(1, 4, 12, padding=3, seed=2)[0], **labels}


def token_labels(number):
    labels = torch.randint(0, number, (4, 12), generator=generator())
    labels[-1, -3:], labels[0, :4] = IGNORED, IGNORED
    return labels


def heads():
    """Name: (model, batch, scored positions of each item)."""
    ones = [1] * 4
    values = torch.randn(4, generator=generator())
    several = torch.randint(0, 2, (4, 3), generator=generator()).float()
    positions = torch.tensor([1, 0, 7, 4])
    seq2seq = seq2seq_batches(1, 4)[0]
    seq2seq["labels"][1, 6:] = IGNORED
    choices = {
        name: value.view(2, 2, 12) for name, value in sentences().items() if value.shape == (4, 12)
    }
    sequence = BertForSequenceClassification
    return {
        "classification": (tiny_bert_classifier(), sentence_batches(1)[0], ones),
        "regression": (tiny_bert(sequence, num_labels=1), sentences(labels=values), ones),
        "regression column": (
            tiny_bert(sequence, num_labels=1),
            sentences(labels=values[:, None]),
            ones,
        ),
        "multi-label": (
            tiny_bert(sequence, num_labels=3, problem_type="multi_label_classification"),
            sentences(labels=several),
            ones,
        ),
        "tokens": (
            tiny_bert(BertForTokenClassification, num_labels=5),
            sentences(labels=token_labels(5)),
            [8, 12, 12, 9],
        ),
        "masked lm": (
            tiny_bert(BertForMaskedLM),
            sentences(labels=token_labels(VOCABULARY)),
            [8, 12, 12, 9],
        ),
        "span": (
            tiny_bert(BertForQuestionAnswering),
            sentences(start_positions=positions, end_positions=positions + 3),
            ones,
        ),
        "choice": (
            tiny_bert(BertForMultipleChoice),
            {**choices, "labels": torch.tensor([1, 0])},
            [1, 1],
        ),
        "seq2seq": (tiny_t5(), seq2seq, [10, 6, 10, 10]),
    }


class Logits(nn.Module):
    """A model that answers with the logits it is given."""

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)

    def forward(self, logits, attention_mask=None):
        return SimpleNamespace(logits=logits)

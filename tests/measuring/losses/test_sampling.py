"""Losses on labels that the model draws."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForQuestionAnswering, BertForTokenClassification

from hf_lowrank.measuring.items import IGNORED
from hf_lowrank.measuring.losses import item_losses
from tests.measuring.losses import (
    CHANGED_LOGITS,
    PLAIN_HEADS,
    Logits,
    causal_batch,
    heads,
    mean_of,
    sentences,
    tiny_bert,
)
from tests.tiny_models import tiny_bert_classifier, tiny_llama, token_batches

ROWS = 20_000


def sampled(logits, **config):
    """Losses of many rows with the same logits, labels drawn by the model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = {"logits": torch.tensor(logits).expand(ROWS, -1)}
        return item_losses(Logits(**config), batch, label_source="model").sums


def test_sampled_classes_follow_the_predictions():
    probabilities = torch.tensor([0.6, 0.3, 0.08, 0.02])
    found = sampled((probabilities.log() + 3).tolist())
    for probability in probabilities:
        drawn = torch.isclose(found, -probability.log(), atol=1e-4).float().mean()
        spread = (probability * (1 - probability) / ROWS).sqrt()
        assert abs(drawn - probability) < 4 * spread


class BertForSpans(Logits):
    """Two spans' worth of logits, taken for a question answering model by the name below."""

    def forward(self, logits, attention_mask=None):
        start, end = logits.unbind(-1)
        return SimpleNamespace(start_logits=start, end_logits=end)


BertForSpans.__name__ = "BertForQuestionAnswering"
MULTI_LABEL = {"problem_type": "multi_label_classification"}
# Name: (model, logits of an item, its labels)
CURVED = {
    "classes": (Logits(), [1.0, -0.5, 0.3], {"labels": torch.tensor([2])}),
    "value": (Logits(), [1.5], {"labels": torch.tensor([0.3])}),
    "values": (
        Logits(problem_type="regression"),
        [1.5, 0.0, -0.4],
        {"labels": torch.zeros(1, 3)},
    ),
    "several labels": (Logits(**MULTI_LABEL), [2.0, -1.0, 0.4], {"labels": torch.ones(1, 3)}),
    "tokens": (
        Logits(),
        [[1.0, -0.5], [0.2, 0.9], [3.0, 0.0]],
        {"labels": torch.tensor([[1, 0, IGNORED]])},
    ),
    "span": (
        BertForSpans(),
        [[1.0, 0.3], [-0.5, 0.0], [0.3, 0.9]],
        {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])},
    ),
}


@pytest.mark.parametrize("name", CURVED)
def test_the_squared_gradient_on_drawn_labels_is_the_second_derivative(name):
    model, logits, labels = CURVED[name]
    item = torch.tensor(logits)

    def loss(values):
        return item_losses(model, {"logits": values[None], **labels}).sums[0]

    size = item.numel()
    wanted = torch.autograd.functional.hessian(loss, item).view(size, size)
    rows = item.repeat(ROWS, *[1] * item.ndim).requires_grad_()
    given = {key: value.expand(ROWS, *value.shape[1:]) for key, value in labels.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = item_losses(model, {"logits": rows, **given}, label_source="model").sums
    gradients = torch.autograd.grad(drawn.sum(), rows)[0].flatten(1)
    found = gradients.T @ gradients / ROWS
    assert float(wanted.norm()) > 0.1
    assert float((found - wanted).norm() / wanted.norm()) < 0.04


def test_sampled_label_sets_follow_the_predictions():
    found = sampled([2.0, -1.0], problem_type="multi_label_classification")
    p, q = torch.tensor(2.0).sigmoid(), torch.tensor(-1.0).sigmoid()
    for first, second, probability in (
        (p, q, p * q),
        (p, 1 - q, p * (1 - q)),
        (1 - p, q, (1 - p) * q),
        (1 - p, 1 - q, (1 - p) * (1 - q)),
    ):
        loss = -(first.log() + second.log()) / 2**0.5
        drawn = torch.isclose(found, loss, atol=1e-5).float().mean()
        assert abs(drawn - probability) < 4 * (probability * (1 - probability) / ROWS).sqrt()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_sampled_next_tokens_leave_padding_out(name):
    model, batch = (PLAIN_HEADS | CHANGED_LOGITS)[name](), causal_batch("right padding")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn, again = (item_losses(model, batch, label_source="model") for _ in range(2))
    from_data = item_losses(model, batch)
    assert drawn.counts.tolist() == from_data.counts.tolist() == [15, 10, 15]
    assert not torch.allclose(drawn.sums, from_data.sums)
    assert not torch.allclose(drawn.sums, again.sums)


def test_sampled_next_tokens_score_near_the_entropy():
    model, batch = tiny_llama(), token_batches(1, 16, 40)[0]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        logs = model(**batch).logits[:, :-1].log_softmax(dim=-1)
        entropy = float(-(logs.exp() * logs).sum(dim=-1).mean())
        drawn = float(mean_of(item_losses(model, batch, label_source="model")))
        from_data = float(mean_of(item_losses(model, batch)))
    assert abs(from_data - entropy) > 0.3
    assert drawn == pytest.approx(entropy, abs=0.15)


def test_sampled_token_labels_leave_padding_out():
    model = tiny_bert(BertForTokenClassification, num_labels=5)
    result = item_losses(model, sentences(), label_source="model")
    assert result.counts.tolist() == [12, 12, 12, 9]
    assert (result.sums > 0).all()


def test_labels_can_be_sampled_with_and_without_a_mask():
    batch = {"input_ids": sentences()["input_ids"]}
    model = tiny_bert(BertForTokenClassification, num_labels=5)
    assert item_losses(model, batch, label_source="model").counts.tolist() == [12] * 4
    for given in (batch, sentences()):
        result = item_losses(tiny_bert_classifier(), given, label_source="model")
        assert result.counts.tolist() == [1] * 4


def test_sampled_translations_keep_their_length():
    model, batch, counts = heads()["seq2seq"]
    result = item_losses(model, batch, label_source="model")
    assert result.counts.tolist() == counts
    assert not torch.allclose(result.sums, item_losses(model, batch).sums)


def test_sampled_spans_are_not_those_of_the_data():
    model, batch, _ = heads()["span"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = item_losses(model, batch, label_source="model").sums
    assert drawn.shape == (4,)
    assert not torch.allclose(drawn, item_losses(model, batch).sums)


def test_spans_can_be_sampled_without_positions():
    batch = sentences()
    result = item_losses(tiny_bert(BertForQuestionAnswering), batch, label_source="model")
    assert result.counts.tolist() == [1, 1, 1, 1]
    assert result.sums.isfinite().all()


def test_sampled_labels_are_held_constant_in_the_gradient():
    logits = torch.tensor([[1.0, -0.5, 0.3]]).repeat(6, 1).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        result = item_losses(Logits(), {"logits": logits}, label_source="model")
    (gradient,) = torch.autograd.grad(result.sums.sum(), logits)
    softmax = logits.detach().softmax(dim=-1)
    drawn = (softmax - gradient).round().argmax(dim=-1)
    assert len(set(drawn.tolist())) > 1
    assert torch.allclose(gradient, softmax - F.one_hot(drawn, 3), atol=1e-6)

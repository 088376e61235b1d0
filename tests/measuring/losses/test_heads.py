"""Losses of other heads and their gradients against the models' own."""

import pytest
import torch
from transformers import BertForQuestionAnswering, BertForSequenceClassification

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.measuring.losses import item_losses
from tests.measuring.losses import (
    Logits,
    assert_same_loss_and_gradient,
    generator,
    heads,
    mean_of,
    sentences,
    tiny_bert,
)
from tests.tiny_models import tiny_bert_classifier, tiny_t5

HEADS = list(heads())


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradient_of_a_head_are_the_models_own(name):
    model, batch, counts = heads()[name]
    result = item_losses(model, batch)
    assert result.sums.dtype == torch.float32
    assert result.sums.shape == result.counts.shape
    assert result.counts.tolist() == counts
    assert_same_loss_and_gradient(model, mean_of(result), model(**batch).loss)


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_of_a_head_is_its_items(name):
    model, batch, _ = heads()[name]
    together = item_losses(model, batch)
    for index in range(len(together.sums)):
        single = item_losses(model, {k: v[index : index + 1] for k, v in batch.items()})
        assert single.sums.item() == pytest.approx(together.sums[index].item(), rel=1e-4)
        assert int(single.counts) == int(together.counts[index])


@pytest.mark.parametrize("labels", ["several labels", "several values"])
def test_labels_tell_the_task_where_the_config_does_not(labels):
    """Transformers' own rule where `problem_type` is not set or says regression."""
    problem = None if labels == "several labels" else "regression"
    values = torch.randint(0, 2, (4, 3), generator=generator()).float()
    if problem:
        values = torch.randn(4, 3, generator=generator())
    model = tiny_bert(BertForSequenceClassification, num_labels=3, problem_type=problem)
    batch = sentences(labels=values)
    found = mean_of(item_losses(model, batch))
    assert found.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("given", ["start_positions", "end_positions", None])
def test_missing_positions_are_named(given):
    batch = sentences(**({given: torch.tensor([1, 0, 7, 4])} if given else {}))
    message = (
        r"^The batches have no start_positions and end_positions, which BertForQuestionAnswering "
        r"needs; add them or set label_source='model'\.$"
    )
    with pytest.raises(DataError, match=message):
        item_losses(tiny_bert(BertForQuestionAnswering), batch)


def test_a_span_outside_the_text_is_ignored_like_in_the_models_own_loss():
    model = tiny_bert(BertForQuestionAnswering)
    outside = torch.tensor([1, 12, 7, 40])
    batch = sentences(start_positions=outside, end_positions=outside)
    inside = {name: value[[0, 2]] for name, value in batch.items()}
    found, wanted = item_losses(model, batch), item_losses(model, inside)
    assert torch.allclose(found.sums[[0, 2]], wanted.sums, rtol=1e-5)
    assert found.sums[[1, 3]].tolist() == [0.0, 0.0]


def test_missing_labels_are_named():
    message = r"^The batches have no 'labels', which BertForSequenceClassification needs; add them"
    with pytest.raises(DataError, match=f"{message} or set label_source='model'."):
        item_losses(tiny_bert_classifier(), sentences())


@pytest.mark.parametrize("label_source", ["data", "model"])
def test_a_model_that_cannot_sample_all_its_labels_is_not_told_to(label_source):
    """The decoder's inputs are made from the labels."""
    message = r"^The batches have no 'labels', which T5ForConditionalGeneration needs; add them\.$"
    with pytest.raises(DataError, match=message):
        item_losses(tiny_t5(), sentences(), label_source=label_source)


class Body(BertForSequenceClassification):
    """No class that transformers lists, and no logits."""

    def forward(self, **inputs):
        return self.bert(**inputs)


@pytest.mark.parametrize("label_source", ["data", "model"])
def test_a_model_without_logits_that_nobody_knows_is_refused(label_source):
    batch = sentences(labels=torch.zeros(4, dtype=torch.long))
    message = (
        "^Body returns no logits, so it has no loss; load the model with its task head, or pass "
        r"loss_function=EmbeddingLoss\(\) to keep its embeddings"
    )
    with pytest.raises(ConfigError, match=message):
        item_losses(tiny_bert(Body), batch, label_source=label_source)


@pytest.mark.parametrize(
    ("labels", "columns"),
    [(torch.tensor([0.3]), 1), (torch.tensor([2]), 3), (torch.tensor([[1.0, 0.0, 1.0]]), 3)],
    ids=["regression", "classification", "multi-label"],
)
def test_losses_of_bfloat16_sentences_are_computed_in_fp32(labels, columns):
    logits = torch.tensor([[7.03125, -3.015625, 0.5][:columns]])
    wanted = item_losses(Logits(), {"logits": logits, "labels": labels}).sums
    found = item_losses(Logits(), {"logits": logits.bfloat16(), "labels": labels}).sums
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, rtol=1e-6)

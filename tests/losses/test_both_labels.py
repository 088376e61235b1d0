"""Gradients for the mean of the empirical and the true Fisher information."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForQuestionAnswering

from hf_lowrank.errors import DataError
from hf_lowrank.losses import item_losses
from hf_lowrank.statistics import collect_moments
from tests.losses import CHANGED_LOGITS, PLAIN_HEADS, Logits, causal_batch, sentences, tiny_bert
from tests.moments import SECOND, linears
from tests.tiny_models import tiny_llama, token_batches

ROWS = 40_000
# Standard error of a mean of products of gradients of order 1 over ROWS draws, times 5.
SPREAD = 5 * ROWS**-0.5


def mean_square(logits, label, **config):
    """Mean of `g g^T` over many draws, g the gradient by the logits of one item."""
    values = torch.tensor(logits).repeat(ROWS, 1).requires_grad_()
    batch = {"logits": values, "labels": label.expand(ROWS, *label.shape)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = item_losses(Logits(**config), batch, label_source="both")
    (gradient,) = torch.autograd.grad(result.sums.sum(), values)
    return gradient.T @ gradient / ROWS


def test_classes():
    logits = [1.0, -0.5, 0.3]
    p = torch.tensor(logits).softmax(dim=-1)
    error = p - F.one_hot(torch.tensor(2), 3)
    expected = (torch.outer(error, error) + p.diag() - torch.outer(p, p)) / 2
    found = mean_square(logits, torch.tensor(2))
    assert (found - expected).abs().max() < SPREAD


def test_values():
    # Mean squared error: the gradient is 2 (z - y), the curvature 2.
    found = mean_square([1.5], torch.tensor(1.0))
    assert float(found) == pytest.approx((4 * 0.5**2 + 2) / 2, abs=5 * SPREAD)


def test_sets_of_labels():
    logits, label = [2.0, -1.0], torch.tensor([1.0, 1.0])
    p = torch.tensor(logits).sigmoid()
    error = (p - label) / 2
    expected = (torch.outer(error, error) + (p * (1 - p)).diag() / 4) / 2
    found = mean_square(logits, label, problem_type="multi_label_classification")
    assert (found - expected).abs().max() < SPREAD


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_padding_has_no_gradient(name):
    model, batch = (PLAIN_HEADS | CHANGED_LOGITS)[name](), causal_batch("right padding")
    embeddings = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda *given: embeddings.append(given[-1].detach().requires_grad_()) or embeddings[-1]
    )
    result = item_losses(model, batch, label_source="both")
    handle.remove()
    assert result.counts.tolist() == [15, 10, 15]
    (gradient,) = torch.autograd.grad(result.sums.sum(), embeddings[-1])
    reached = gradient.abs().sum(dim=-1) > 0
    assert not reached[batch["attention_mask"] == 0].any()
    assert reached[:, 0].all()


def test_spans_need_positions():
    batch = sentences()
    with pytest.raises(DataError, match="start_positions"):
        item_losses(tiny_bert(BertForQuestionAnswering), batch, label_source="both")


def test_the_moment_is_between_the_two_kinds():
    """On many draws of the same batch G is the mean of that of the data and that of the model."""
    model, name = tiny_llama(), "model.layers.1.mlp.down_proj"
    batches = token_batches(1, 4, 8) * 300
    data, model_drawn, both = (
        collect_moments(model, {name: linears(model)[name]}, batches, SECOND, label_source=source)[
            name
        ].output.matrix
        for source in ("data", "model", "both")
    )
    expected = (data + model_drawn) / 2
    assert (both - expected).norm() < 0.1 * expected.norm()
    assert (both - data).norm() > 0.3 * (data - model_drawn).norm()

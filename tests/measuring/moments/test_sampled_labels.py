"""Moments with labels that the model draws."""

import pytest
import torch

from hf_lowrank.errors import DataError
from hf_lowrank.measuring.collection import collect_moments
from tests.measuring.moments import SECOND, linears
from tests.tiny_models import tiny_bert_classifier, tiny_llama, token_batches


def sampled_moments(model, seed, batches=None):
    batches = batches or token_batches(1, padding=4)
    return collect_moments(model, linears(model), batches, SECOND, label_source="model", seed=seed)


def test_sampled_labels_follow_the_seed():
    model, name = tiny_llama(), "model.layers.0.mlp.down_proj"
    first, again, other = (sampled_moments(model, seed)[name] for seed in (1, 1, 2))
    from_data = collect_moments(model, linears(model), token_batches(1, padding=4), SECOND)[name]
    assert torch.equal(first.output.matrix, again.output.matrix)
    assert not torch.allclose(first.output.matrix, other.output.matrix, rtol=0.01)
    assert not torch.allclose(first.output.matrix, from_data.output.matrix, rtol=0.01)
    assert torch.equal(first.input.matrix, from_data.input.matrix)
    assert (first.tokens, first.losses) == (from_data.tokens, from_data.losses)


def test_sampled_labels_differ_from_batch_to_batch():
    model, name = tiny_llama(), "model.layers.0.mlp.down_proj"
    batch = token_batches(1)[0]
    once = sampled_moments(model, 1, [batch])[name].output.matrix
    twice = sampled_moments(model, 1, [batch, batch])[name].output.matrix
    assert not torch.allclose(2 * once, twice, rtol=0.01)


def test_no_labels_are_needed_where_they_are_sampled():
    model, batch = tiny_bert_classifier(), token_batches(1, 4, padding=4)[0]
    layers = linears(model)
    moments = collect_moments(model, layers, [batch], SECOND, label_source="model")
    assert next(iter(moments.values())).losses == 4
    with pytest.raises(DataError, match=r"^The batches have no 'labels'"):
        collect_moments(model, layers, [batch], SECOND)

"""Embeddings as the objective: pooling, the distance, and gradients that are Gauss-Newton's."""

import math

import pytest
import torch
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    T5Model,
)

from hf_lowrank import EmbeddingLoss
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.embeddings import embedding_loss, has_no_head, with_embeddings
from hf_lowrank.measuring.losses import item_losses
from tests.tiny_models import (
    build,
    tiny_bert_classifier,
    tiny_llama,
    tiny_t5,
    token_batches,
)

SIDES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIDES |= {"num_attention_heads": 2, "projection_dim": 8}
VISION = {**SIDES, "image_size": 8, "patch_size": 4}
TEXT = {**SIDES, "vocab_size": 96, "max_position_embeddings": 32, "eos_token_id": 2}


def tiny_bert() -> BertModel:
    return tiny_bert_classifier().bert


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hidden_of(model, batch):
    return model(**batch).last_hidden_state


def test_the_default_is_the_mean_of_the_tokens_that_count_at_length_one():
    model, (batch,) = tiny_bert(), token_batches(1, padding=5)
    hidden = hidden_of(model, batch)
    wanted = torch.stack([hidden[0].mean(0), hidden[1, :-5].mean(0)])
    wanted /= wanted.norm(dim=1, keepdim=True)
    assert torch.allclose(EmbeddingLoss().embed(model, batch), wanted, atol=1e-6)
    raw = EmbeddingLoss(normalize=False).embed(model, batch)
    assert torch.allclose(raw[1], hidden[1, :-5].mean(0), atol=1e-6)


def test_the_first_and_the_last_token_that_counts():
    model, (batch,) = tiny_bert(), token_batches(1, padding=5)
    hidden = hidden_of(model, batch)
    first = EmbeddingLoss("cls", normalize=False).embed(model, batch)
    last = EmbeddingLoss("last", normalize=False).embed(model, batch)
    assert torch.equal(first, hidden[:, 0])
    assert torch.equal(last, torch.stack([hidden[0, -1], hidden[1, -6]]))


def test_the_loss_is_one_minus_the_cosine_to_the_labels():
    model, batches = tiny_bert(), token_batches(2, seed=3)
    (labelled,) = with_embeddings(model, batches[1:], EmbeddingLoss())
    found = item_losses(model, {**batches[0], "labels": labelled["labels"]})
    own = EmbeddingLoss().embed(model, batches[0])
    assert torch.allclose(found.sums, 1 - (own * labelled["labels"]).sum(1), atol=1e-6)
    assert found.counts.tolist() == [1, 1]
    assert item_losses(model, labelled).sums.tolist() == [0.0, 0.0]


def test_gradients_sum_to_the_gauss_newton_matrix():
    """Of the last layer's bias: J is the Jacobian of the embedding with respect to it."""
    model = tiny_bert()
    batch = {"input_ids": token_batches(1, batch_size=1, length=6)[0]["input_ids"]}
    bias = model.encoder.layer[1].output.dense.bias

    def embed(value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            old = bias.clone()
        bias.data = value
        found = EmbeddingLoss().embed(model, batch)[0]
        bias.data = old
        return found

    draws = []
    torch.manual_seed(0)
    for _ in range(1500):
        loss = EmbeddingLoss()(model, batch).sums.sum()
        draws.append(torch.autograd.grad(loss, bias)[0])
    found = torch.stack(draws).T @ torch.stack(draws) / len(draws)
    embedding = EmbeddingLoss().embed(model, batch)[0]
    rows = [torch.autograd.grad(each, bias, retain_graph=True)[0] for each in embedding]
    wanted = torch.stack(rows).T @ torch.stack(rows)
    assert float((found - wanted).norm() / wanted.norm()) < 0.15
    assert float(found.trace() / wanted.trace()) == pytest.approx(1, abs=0.05)


def test_moments_are_drawn_from_the_seed():
    model, batches = tiny_bert(), token_batches(2)
    layers = {"x": model.encoder.layer[0].output.dense}

    def output(seed: int) -> torch.Tensor:
        return collect_moments(model, layers, batches, frozenset({"output"}), seed=seed)[
            "x"
        ].output.matrix

    assert torch.equal(output(0), output(0))
    assert not torch.equal(output(0), output(1))


def test_only_models_without_a_head_are_taken_for_embeddings():
    assert has_no_head(tiny_bert())
    assert has_no_head(tiny_llama().model)
    assert not has_no_head(tiny_llama())
    assert not has_no_head(tiny_bert_classifier())
    assert embedding_loss(tiny_bert(), None) == EmbeddingLoss()
    assert embedding_loss(tiny_bert_classifier(), None) is None
    chosen = EmbeddingLoss("cls")
    assert embedding_loss(tiny_bert_classifier(), chosen) is chosen
    assert embedding_loss(tiny_bert(), item_losses) is None


def test_towers_of_images_and_text_give_what_they_pool_and_project():
    vision, pixels = CLIPVisionConfig(**VISION), {"pixel_values": images()}
    tower = build(CLIPVisionModel, vision, 0)
    with torch.no_grad():
        pooled = tower(**pixels).pooler_output
    assert has_no_head(tower)
    found = EmbeddingLoss(normalize=False).embed(tower, pixels)
    assert torch.equal(found, pooled)
    projecting = build(CLIPVisionModelWithProjection, vision, 0)
    assert has_no_head(projecting)
    assert EmbeddingLoss().embed(projecting, pixels).shape == (4, 8)
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    both = build(CLIPModel, config, 0)
    tokens = token_batches(1, batch_size=4, length=8)[0]
    found = EmbeddingLoss().embed(both, {**tokens, **pixels})
    assert found.shape == (4, 16)
    assert torch.allclose(found.square().sum(1), torch.ones(4))
    words = build(CLIPTextModelWithProjection, config.text_config, 0)
    assert EmbeddingLoss().embed(words, tokens).shape == (4, 8)


def test_what_is_no_embedding_is_refused():
    model, (batch,) = tiny_bert(), token_batches(1)
    message = r"^labels of shape \(2,\) are no embeddings: this model gives \(2, 32\); leave them"
    with pytest.raises(DataError, match=message):
        item_losses(model, {**batch, "labels": torch.zeros(2, dtype=torch.long)})
    with pytest.raises(
        ConfigError, match=r"^pooling must be one of mean, cls, last, output; got 'x'"
    ):
        EmbeddingLoss("x")
    message = "^LlamaModel returns no pooled output, so it has no embedding; choose another pooling"
    with pytest.raises(ConfigError, match=message):
        EmbeddingLoss("output").embed(tiny_llama().model, batch)
    message = "^T5Model: has an encoder and a decoder, so what its embedding is can't be known"
    with pytest.raises(ConfigError, match=message):
        item_losses(T5Model(tiny_t5().config), batch)


def test_without_labels_the_loss_says_nothing_but_its_gradient():
    model, (batch,) = tiny_bert(), token_batches(1, batch_size=64)
    torch.manual_seed(0)
    with torch.no_grad():
        found = item_losses(model, batch).sums.mean()
    assert math.isclose(float(found), 16, rel_tol=0.1)  # half of chi squared with 32 degrees

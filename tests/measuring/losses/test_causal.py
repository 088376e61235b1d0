"""Losses of causal language models and their gradients against the models' own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.measuring import causal
from hf_lowrank.measuring.items import IGNORED, is_causal_lm, is_encoder_decoder
from hf_lowrank.measuring.losses import forward_body, item_losses, prepare_losses
from tests.measuring.losses import (
    CHANGED_LOGITS,
    PLAIN_HEADS,
    assert_same_loss_and_gradient,
    causal_batch,
    mean_of,
    tiny_bert_decoder,
    tiny_gemma2,
)
from tests.tiny_models import (
    sentence_batches,
    seq2seq_batches,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_batches,
)


def own_loss(model, batch):
    """(mean loss by the model's own forward pass, scored positions).

    Neither padding nor what follows it is scored: the first token after padding on the left has
    nothing before it to be predicted from.
    """
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = IGNORED
            labels[:, 1:][batch["attention_mask"][:, :-1] == 0] = IGNORED
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, labels=labels).loss, int((labels[:, 1:] != IGNORED).sum())


KINDS = ["tokens", "no padding", "right padding", "left padding", "labels"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*PLAIN_HEADS, *CHANGED_LOGITS])
def test_causal_loss_and_gradient_are_the_models_own(name, kind):
    model = (PLAIN_HEADS | CHANGED_LOGITS)[name]()
    batch = causal_batch(kind)
    result = item_losses(model, batch)
    wanted, positions = own_loss(model, batch)
    assert int(result.counts.sum()) == positions
    assert_same_loss_and_gradient(model, mean_of(result), wanted)


@pytest.mark.parametrize("name", PLAIN_HEADS)
@pytest.mark.parametrize("kind", ["right padding", "labels"])
@pytest.mark.parametrize("slice_tokens", [1, 5, 16, 47, 48, 49])
def test_slices_add_up_to_the_whole(monkeypatch, name, kind, slice_tokens):
    monkeypatch.setattr(causal, "SLICE_TOKENS", slice_tokens)
    model, batch = PLAIN_HEADS[name](), causal_batch(kind)
    wanted, _ = own_loss(model, batch)
    assert_same_loss_and_gradient(model, mean_of(item_losses(model, batch)), wanted)


def test_a_sequence_longer_than_a_slice():
    model = tiny_llama(max_position_embeddings=1024)
    batch = token_batches(1, 1, causal.SLICE_TOKENS + 70)[0]
    wanted, _ = own_loss(model, batch)
    assert_same_loss_and_gradient(model, mean_of(item_losses(model, batch)), wanted)


@pytest.mark.parametrize("grad", [True, False])
def test_the_head_never_sees_more_than_one_slice(monkeypatch, grad):
    monkeypatch.setattr(causal, "SLICE_TOKENS", 7)
    model, batch = tiny_llama(), causal_batch("no padding")
    prepare_losses(model, batch)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda *call: sizes.append(len(call[-1])))
    with torch.set_grad_enabled(grad):
        item_losses(model, batch)
    handle.remove()
    assert sizes == [7] * 6 + [6]


def test_slices_without_a_label_are_skipped(monkeypatch):
    monkeypatch.setattr(causal, "SLICE_TOKENS", 4)
    model, batch = tiny_llama(), causal_batch("no padding")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[1, 6] = 9  # the target of position 16 + 5, in the sixth slice
    prepare_losses(model, batch)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *call: calls.append(len(call[-1])))
    result = item_losses(model, {**batch, "labels": labels})
    handle.remove()
    assert calls == [4]
    assert result.counts.tolist() == [0, 1, 0]
    assert result.sums[[0, 2]].tolist() == [0.0, 0.0]
    assert result.sums[1] > 0


def test_items_are_kept_apart_in_value_and_gradient():
    model, batch = tiny_llama(), causal_batch("right padding")
    result = item_losses(model, batch)
    assert result.counts.tolist() == [15, 10, 15]
    for index in range(3):
        single = {name: value[index : index + 1] for name, value in batch.items()}
        wanted, positions = own_loss(model, single)
        assert result.sums[index].item() == pytest.approx(wanted.item() * positions, rel=1e-5)
    weights = torch.tensor([0.5, -2.0, 0.0])
    parts = [
        own_loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0] * n
        for i, n in enumerate((15, 10, 15))
    ]
    wanted = (weights * torch.stack(parts)).sum()
    assert_same_loss_and_gradient(model, (weights * result.sums).sum(), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_losses_without_gradient_are_the_same(name):
    model, batch = (PLAIN_HEADS | CHANGED_LOGITS)[name](), causal_batch("labels")
    with torch.no_grad():
        result = item_losses(model, batch)
    assert not result.sums.requires_grad
    assert torch.allclose(result.sums, item_losses(model, batch).sums.detach(), rtol=1e-6)


@pytest.mark.parametrize("name", CHANGED_LOGITS)
def test_what_a_model_does_to_its_logits_matters(name):
    """So that the tests above would notice if it were left out."""
    model, batch = CHANGED_LOGITS[name](), causal_batch("tokens")
    hidden = model.base_model(**batch)[0]
    raw = model.get_output_embeddings()(hidden)[:, :-1]
    targets = batch["input_ids"][:, 1:]
    without = F.cross_entropy(raw.flatten(0, 1), targets.flatten())
    assert abs((without - own_loss(model, batch)[0]).item()) > 0.05


def test_a_change_of_small_logits_is_not_overlooked():
    """A soft cap at 30 hardly shows while the logits are small, but it does once they grow."""
    model, batch = tiny_gemma2(), causal_batch("tokens")
    model.config.final_logit_softcapping = 30.0
    prepare_losses(model, batch)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    wanted, _ = own_loss(model, batch)
    assert mean_of(item_losses(model, batch)).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
@pytest.mark.parametrize("slice_tokens", [1, 5, 48])
def test_changed_logits_fit_slices(monkeypatch, name, slice_tokens):
    monkeypatch.setattr(causal, "SLICE_TOKENS", slice_tokens)
    model, batch = CHANGED_LOGITS[name](), causal_batch("labels")
    forward = model.base_model.forward
    prepare_losses(model, batch)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda *call: sizes.append(call[-1].shape[-2]))
    found = mean_of(item_losses(model, batch))
    handle.remove()
    assert max(sizes) == slice_tokens
    wanted, _ = own_loss(model, batch)
    assert_same_loss_and_gradient(model, found, wanted)
    assert model.base_model.forward == forward


def test_losses_of_a_bfloat16_model_are_summed_in_fp32():
    model = tiny_llama().bfloat16()
    batch = causal_batch("no padding")
    result = item_losses(model, batch)
    assert result.sums.dtype == torch.float32
    logits = model(**batch).logits.float()[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert mean_of(result).item() == pytest.approx(wanted.item(), rel=1e-3)


def test_what_is_found_out_about_a_model_is_found_out_once():
    model, batch = tiny_llama(), causal_batch("tokens")
    prepare_losses(model, batch)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *call: calls.append(1))
    item_losses(model, batch)
    item_losses(model, batch)
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_body_alone_is_run_where_the_head_is_last(name):
    model, batch = PLAIN_HEADS[name](), causal_batch("labels")
    prepare_losses(model, batch)
    seen = []
    handles = [
        module.register_forward_hook(lambda module, *rest: seen.append(module))
        for module in (model.base_model, model.lm_head)
    ]
    with torch.no_grad():
        forward_body(model, batch)
    for handle in handles:
        handle.remove()
    assert seen == [model.base_model]


@pytest.mark.parametrize("make", [tiny_bert_decoder, tiny_t5, tiny_bert_classifier])
def test_the_whole_model_is_run_where_it_has_to_be(make):
    model = make()
    batch = {
        tiny_bert_decoder: causal_batch("labels"),
        tiny_t5: seq2seq_batches(1)[0],
        tiny_bert_classifier: sentence_batches(1)[0],
    }[make]
    prepare_losses(model, batch)
    seen = []
    handle = model.register_forward_hook(lambda *call: seen.append(1))
    with torch.no_grad():
        forward_body(model, batch)
    handle.remove()
    assert seen == [1]


def test_kinds_of_models():
    assert is_causal_lm(tiny_llama())
    assert is_causal_lm(tiny_gpt2())
    assert not is_causal_lm(tiny_bert_classifier())
    assert not is_causal_lm(tiny_t5())
    assert not is_causal_lm(nn.Linear(2, 2))
    assert is_encoder_decoder(tiny_t5())
    assert not is_encoder_decoder(tiny_llama())
    assert not is_encoder_decoder(nn.Linear(2, 2))

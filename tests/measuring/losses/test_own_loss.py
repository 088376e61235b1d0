"""What a model's own loss is: agreed with, or refused rather than guessed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    ElectraConfig,
    ElectraForCausalLM,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    RemBertConfig,
    RemBertForCausalLM,
    RemBertForMaskedLM,
    RoFormerConfig,
    RoFormerForCausalLM,
    RoFormerForMaskedLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    XLMConfig,
    XLMWithLMHeadModel,
)

from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring.items import IGNORED
from hf_lowrank.measuring.losses import item_losses, prepare_losses
from tests.measuring.losses import causal_batch, mean_of, sentences, tiny_bert, token_labels
from tests.tiny_models import (
    VOCABULARY,
    build,
    sentence_batches,
    seq2seq_batches,
    tiny_bert_classifier,
    tiny_mixtral,
    tiny_t5,
)

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "embedding_size": 16,  # the head reads 16 numbers, not the 32 of the hidden states
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
REMBERT = {**ENCODER, "input_embedding_size": 24, "output_embedding_size": 40}


def tiny_bart_decoder():
    """A decoder whose loss is on labels in the places of their logits."""
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        init_std=0.2,
        is_encoder_decoder=False,
    )
    return build(BartForCausalLM, config, 0)


def tiny_xlm():
    config = XLMConfig(vocab_size=VOCABULARY, emb_dim=32, n_layers=1, n_heads=4, init_std=0.2)
    return build(XLMWithLMHeadModel, config, 0)


def tiny_speech():
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    return build(Wav2Vec2ForCTC, config, 0)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (ElectraForMaskedLM, ElectraConfig(**ENCODER)),
        (RoFormerForMaskedLM, RoFormerConfig(**ENCODER)),
        (RemBertForMaskedLM, RemBertConfig(**REMBERT)),
    ],
)
def test_heads_that_read_another_width_have_their_own_masked_loss(model_class, config):
    model = build(model_class, config, 0)
    batch = sentences(labels=token_labels(VOCABULARY))
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    found = item_losses(model, batch)
    assert found.counts.tolist() == [8, 12, 12, 9]
    assert float(mean_of(found).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (ElectraForCausalLM, ElectraConfig(**ENCODER, is_decoder=True)),
        (RoFormerForCausalLM, RoFormerConfig(**ENCODER, is_decoder=True)),
        (RemBertForCausalLM, RemBertConfig(**REMBERT, is_decoder=True)),
    ],
)
def test_heads_that_read_another_width_have_their_own_next_token_loss(model_class, config):
    model, batch = build(model_class, config, 0), causal_batch("tokens")
    logits = model(**batch).logits[:, :-1].double()
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    found = mean_of(item_losses(model, batch))
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    own = model(**batch, labels=batch["input_ids"]).loss
    assert float(found.detach()) == pytest.approx(float(own.detach()), rel=1e-5)


def test_labels_of_a_translation_decoder_stand_in_their_places():
    model, batch = tiny_bart_decoder(), causal_batch("tokens")
    labels = batch["input_ids"].roll(-1, dims=1)
    labels[:, -1] = IGNORED
    labels[0, 3:7] = IGNORED
    found = item_losses(model, {**batch, "labels": labels})
    own = model(**batch, labels=labels).loss
    assert found.counts.tolist() == [11, 15, 15]
    assert float(mean_of(found).detach()) == pytest.approx(float(own.detach()), rel=1e-5)


def test_text_without_labels_is_still_predicted_by_what_stands_before_it():
    model, batch = tiny_bart_decoder(), causal_batch("tokens")
    logits = model(**batch).logits[:, :-1].double()
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    found = item_losses(model, batch)
    assert found.counts.tolist() == [15, 15, 15]
    assert float(mean_of(found).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_a_model_that_sees_the_next_token_is_not_asked_for_it():
    model, batch = tiny_xlm(), causal_batch("tokens")
    message = r"^XLMWithLMHeadModel: its own loss is not on the next token, which it can see; pass"
    with pytest.raises(ConfigError, match=message):
        item_losses(model, batch)
    labels = batch["input_ids"].clone()
    labels[:, ::2] = IGNORED
    found = item_losses(model, {**batch, "labels": labels})
    own = model(**batch, labels=labels).loss
    assert float(mean_of(found).detach()) == pytest.approx(float(own.detach()), rel=1e-5)


def test_the_balance_of_experts_is_no_part_of_the_loss_of_text():
    model, batch = tiny_mixtral(), causal_batch("labels")
    plain = item_losses(model, batch).sums.detach()
    other = tiny_mixtral()
    other.config.output_router_logits = True
    assert torch.equal(item_losses(other, batch).sums.detach(), plain)


class Doubled(type(tiny_bart_decoder())):
    """A causal language model with a loss of its own."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if output.loss is not None:
            output.loss = 2 * output.loss
        return output


def test_labels_under_a_loss_of_its_own_are_refused_and_text_is_not():
    model, batch = build(Doubled, tiny_bart_decoder().config, 0), causal_batch("tokens")
    wanted = item_losses(tiny_bart_decoder(), batch).sums
    assert torch.equal(item_losses(model, batch).sums, wanted)
    message = "^Doubled: its own loss is not the cross-entropy of its labels; pass a loss_function"
    with pytest.raises(ConfigError, match=message):
        item_losses(model, {**batch, "labels": batch["input_ids"]})


def speech_batch(length):
    sound = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(1, 32, (2, length), generator=torch.Generator().manual_seed(1))
    labels[:, 5:] = IGNORED
    return {"input_values": sound, "labels": labels}


def test_speech_recognition_is_refused_with_both_losses():
    model = tiny_speech()
    frames = model(speech_batch(1)["input_values"]).logits.shape[1]
    batch = speech_batch(frames)
    own = float(model(**batch).loss.detach())
    message = rf"^Wav2Vec2ForCTC: its own loss is {own:.4g} where .* says \d\.\d+; pass a loss_func"
    with pytest.raises(ConfigError, match=message):
        item_losses(model, batch)


def test_labels_of_another_length_than_the_logits_are_refused():
    message = "^Wav2Vec2ForCTC: its own loss can't be had of these batches .*; pass a loss_function"
    with pytest.raises(ConfigError, match=message):
        item_losses(tiny_speech(), speech_batch(5))


@pytest.mark.parametrize("source", ["data", "model"])
def test_electras_discriminator_is_refused(source):
    model = build(ElectraForPreTraining, ElectraConfig(**ENCODER), 0)
    batch = sentences()
    if source == "data":
        batch["labels"] = (batch["input_ids"] % 2).long()
    with pytest.raises(
        ConfigError, match=r"^ElectraForPreTraining: its own loss .*; pass a loss_f"
    ):
        item_losses(model, batch, source)


@pytest.mark.parametrize("source", ["data", "model"])
def test_asking_leaves_the_models_config_alone(source):
    model, batch = tiny_bert_classifier(), sentence_batches(1)[0]
    if source == "model":
        del batch["labels"]
    item_losses(model, batch, source)
    assert model.config.problem_type is None
    assert not model.training


@pytest.mark.parametrize("make", [tiny_bert_classifier, tiny_t5, tiny_bart_decoder])
def test_a_model_is_asked_once_and_hooks_may_count_what_follows(make):
    model = make()
    batch = {
        tiny_bert_classifier: sentence_batches(1)[0],
        tiny_t5: seq2seq_batches(1)[0],
        tiny_bart_decoder: causal_batch("tokens"),
    }[make]
    prepare_losses(model, batch)
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda *call: calls.append(1))
    item_losses(model, batch)
    assert calls == [1]


def test_rounding_is_no_other_loss():
    model = tiny_bert_classifier().bfloat16()
    found = mean_of(item_losses(model, sentence_batches(1)[0]))
    assert math.isfinite(float(found.detach()))
    decoder = tiny_bart_decoder().bfloat16()
    assert item_losses(decoder, causal_batch("tokens")).counts.tolist() == [15, 15, 15]


def test_only_two_items_are_read():
    model, sizes = tiny_bert(type(tiny_bert_classifier()), num_labels=3), []
    model.register_forward_hook(lambda *call: sizes.append(len(call[-1].logits)))
    item_losses(model, sentence_batches(1)[0])
    assert sizes == [2, 4]

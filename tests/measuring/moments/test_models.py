"""Moments of transformers models against captured activations and gradients."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.measuring import losses
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import IGNORED
from hf_lowrank.measuring.losses import item_losses
from tests.measuring.moments import ALL, SECOND, assert_close, assert_equal_moments, linears, split
from tests.tiny_models import (
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


def captured(model, layers, batch):
    """{name: (inputs, output gradients)} under the model's own summed loss."""
    seen, handles = {}, []
    for name, layer in layers.items():

        def keep(layer, args, output, name=name):
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        handles.append(layer.register_forward_hook(keep))
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    outputs = model(**{**batch, "labels": labels})
    scored = labels[:, 1:] if losses.is_causal_lm(model) else labels
    count = int((scored != IGNORED).sum())
    (outputs.loss * count).backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return {name: (inputs, output.grad) for name, (inputs, output) in seen.items()}, count


def mask_of(name, batch):
    """Which positions of a layer's input are real."""
    is_decoder = name.startswith("decoder.") and not name.endswith(
        ("EncDecAttention.k", "EncDecAttention.v")
    )
    if is_decoder:
        return batch["labels"] != IGNORED
    return batch["attention_mask"].bool()


def t5_batch(length):
    batch = seq2seq_batches(1, 3)[0]
    batch["labels"] = batch["labels"].repeat(1, 2)[:, :length].contiguous()
    batch["labels"][1, 6:] = IGNORED
    batch["attention_mask"][2, 9:] = 0
    return batch


MODELS = {
    "llama": (tiny_llama, lambda: token_batches(1, 3, padding=5)[0]),
    "gpt2": (tiny_gpt2, lambda: token_batches(1, 3, padding=5)[0]),
    "opt": (tiny_opt, lambda: token_batches(1, 3, padding=5)[0]),
    "bert": (tiny_bert_classifier, lambda: sentence_batches(1, 3)[0]),
    "t5": (tiny_t5, lambda: t5_batch(10)),
    "t5, lengths equal": (tiny_t5, lambda: t5_batch(16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_moments_of_a_model_equal_its_captured_activations(name):
    model, batch = MODELS[name][0](), MODELS[name][1]()
    layers = linears(model)
    wanted, count = captured(model, layers, batch)
    moments = collect_moments(model, layers, [batch], ALL)
    assert len(layers) >= 8
    for layer_name, (inputs, gradients) in wanted.items():
        found, layer = moments[layer_name], layers[layer_name]
        mask, (rows, columns) = mask_of(layer_name, batch), linear_shape(layer)
        inputs, gradients = inputs.reshape(-1, columns), gradients.reshape(-1, rows)
        W, x, g = linear_weight(layer), inputs[mask.flatten()], gradients[mask.flatten()]
        assert (found.tokens, found.losses) == (int(mask.sum()), count)
        assert not mask.all()
        image = x @ W.T if columns > rows else x
        assert_close(found.input.matrix, image.T @ image)
        image = g @ W if rows > columns else g
        assert_close(found.output.matrix, image.T @ image)
        assert found.input.squares == pytest.approx(float(x.square().sum()), rel=1e-4)
        assert found.output.squares == pytest.approx(float(g.square().sum()), rel=1e-3)
        assert_close(found.input_abs, x.abs().sum(0))
        assert_close(found.gradient, gradients.T @ inputs)


@pytest.mark.parametrize("name", ["llama", "bert", "t5, lengths equal"])
def test_moments_without_gradients_are_the_same(name):
    model, batch = MODELS[name][0](), MODELS[name][1]()
    layers = linears(model)
    wanted = collect_moments(model, layers, [batch], SECOND)
    found = collect_moments(model, layers, [batch], frozenset({"input"}))
    for layer_name in layers:
        assert found[layer_name].output is None
        assert_close(found[layer_name].input.matrix, wanted[layer_name].input.matrix)


def padded_encoder_decoder_batch():
    """Equal lengths, padding on both sides."""
    batch = t5_batch(16)
    assert batch["labels"].shape == batch["attention_mask"].shape
    return batch


def test_an_encoder_without_attention_mask_has_no_padding():
    """However many of the labels are ignored."""
    model, batch = tiny_t5(), padded_encoder_decoder_batch()
    del batch["attention_mask"]
    layers = linears(model)
    for name, moment in collect_moments(model, layers, [batch], SECOND).items():
        full = dict(batch, attention_mask=torch.ones(3, 16))
        assert moment.tokens == int(mask_of(name, full).sum()), name


def tiny_bart():
    """Learned positions: 16 and no more, on either side."""
    config = BartConfig(
        vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0,
        max_position_embeddings=16, init_std=0.2, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    return build(BartForConditionalGeneration, config, 0)


def full_length_batch():
    tokens, targets = (token_batches(1, 3, seed=seed)[0]["input_ids"] for seed in (0, 1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": targets}


def test_lengths_at_the_limit_without_padding_lose_nothing():
    model, batch = tiny_bart(), full_length_batch()
    layers = linears(model)
    wanted, count = captured(model, layers, batch)
    moments = collect_moments(model, layers, [batch], ALL)
    for name, (inputs, gradients) in wanted.items():
        assert (moments[name].tokens, moments[name].losses) == (3 * 16, count)
        assert_close(moments[name].gradient, gradients.flatten(0, 1).T @ inputs.flatten(0, 1))


@pytest.mark.parametrize("with_inputs", [False, True])
def test_lengths_at_the_limit_with_padding_lose_the_last_label_alone(with_inputs):
    """Both sides have their own padding, so they can't share a mask."""
    model, batch = tiny_bart(), full_length_batch()
    batch["attention_mask"][2, 9:] = 0
    batch["labels"][1, 6:] = IGNORED
    if with_inputs:
        decoder_inputs = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        batch["decoder_input_ids"] = decoder_inputs
        batch["decoder_attention_mask"] = torch.ones_like(decoder_inputs)
    layers = linears(model)
    cut = {k: v if k in ("input_ids", "attention_mask") else v[:, :-1] for k, v in batch.items()}
    cut["labels"] = cut["labels"].contiguous()
    moments = collect_moments(model, layers, [batch], ALL)
    assert_equal_moments(moments, collect_moments(model, layers, [cut], ALL))
    assert moments["model.encoder.layers.0.fc1"].tokens == 3 * 16 - 7
    assert moments["model.decoder.layers.0.fc1"].tokens == 3 * 15 - 9


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
def test_the_limit_of_a_nested_decoder_counts():
    side = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 96}
    side |= {"num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 1}
    config = EncoderDecoderConfig(
        encoder={"model_type": "bert", **side},
        decoder={"model_type": "bert", "is_decoder": True, "add_cross_attention": True, **side},
        decoder_start_token_id=1,
        pad_token_id=0,
    )
    model, batch = build(EncoderDecoderModel, config, 0), full_length_batch()
    layers = linears(model)
    assert collect_moments(model, layers, [batch], SECOND).keys() == layers.keys()


def test_an_encoder_may_read_something_else_than_tokens():
    """Speech: `input_features` of another length than the encoder's positions, and no mask."""
    config = WhisperConfig(
        vocab_size=96, num_mel_bins=4, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=8, max_target_positions=16,
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = build(WhisperForConditionalGeneration, config, 0)
    labels = token_batches(1, 2, 6)[0]["input_ids"]
    labels[0, 4:] = IGNORED
    features = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    layers = {
        "encoder": model.model.encoder.layers[0].fc1,
        "decoder": model.model.decoder.layers[0].fc1,
    }
    batch = {"input_features": features, "labels": labels}
    moments = collect_moments(model, layers, [batch], SECOND)
    assert moments["encoder"].tokens == 2 * 8
    assert moments["decoder"].tokens == moments["decoder"].losses == 4 + 6


def test_decoder_inputs_may_come_along_with_the_labels():
    """As `DataCollatorForSeq2Seq` adds them."""
    model, batch = tiny_t5(), padded_encoder_decoder_batch()
    layers = linears(model)
    wanted = collect_moments(model, layers, [batch], ALL)
    decoder_inputs = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    full = {**batch, "decoder_input_ids": decoder_inputs}
    assert_equal_moments(collect_moments(model, layers, [full], ALL), wanted)


def test_padding_of_choices_is_left_out():
    config = BertConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    model = build(BertForMultipleChoice, config, 0)
    batch = token_batches(1, 4, 12, padding=5)[0]
    choices = {name: value.view(2, 2, 12) for name, value in batch.items()}
    choices["labels"] = torch.tensor([1, 0])
    layers = {"up": model.bert.encoder.layer[0].intermediate.dense}
    moments = collect_moments(model, layers, [choices], SECOND)
    assert (moments["up"].tokens, moments["up"].losses) == (4 * 12 - 5, 2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt, tiny_bert_classifier, tiny_t5])
def test_eight_by_one_equals_one_by_eight(make):
    """OPT hands flattened positions to its feed-forward layers."""
    model = make()
    causal = token_batches(1, 8, padding=5)[0]
    causal["labels"] = causal["input_ids"].masked_fill(causal["attention_mask"] == 0, IGNORED)
    batch = {
        tiny_bert_classifier: sentence_batches(1, 8)[0],
        tiny_t5: seq2seq_batches(1, 8)[0],
    }.get(make, causal)
    layers = linears(model)
    together = collect_moments(model, layers, [batch], ALL)
    assert_equal_moments(collect_moments(model, layers, split(batch, 1), ALL), together)


def test_sentence_level_layers_keep_their_sentences_apart():
    """A pooler sees one vector for each sentence, not a sequence of them."""
    model, batch = tiny_bert_classifier(), sentence_batches(1, 4)[0]
    layers = {"pooler": model.bert.pooler.dense}
    together = collect_moments(model, layers, [batch], ALL)
    assert together["pooler"].tokens == 4
    assert_equal_moments(collect_moments(model, layers, split(batch, 1), ALL), together)


def test_bfloat16_activations_are_summed_in_fp32():
    model, batch = tiny_llama().bfloat16(), token_batches(1, 2, 16)[0]
    name = "model.layers.0.mlp.down_proj"
    layers = {name: model.get_submodule(name)}
    wanted, _ = captured(model, layers, batch)
    moment = collect_moments(model, layers, [batch], ALL)[name]
    inputs, gradients = (value.float().flatten(0, 1) for value in wanted[name])
    assert moment.output.matrix.dtype == moment.input.matrix.dtype == torch.float32
    assert moment.output.squares == pytest.approx(float(gradients.square().sum()), rel=0.02)
    assert moment.input.squares == pytest.approx(float(inputs.square().sum()), rel=1e-5)
    assert torch.allclose(moment.input_abs, inputs.abs().sum(0), rtol=1e-5)


def test_the_default_loss_is_the_models_own():
    model, batches = tiny_llama(), token_batches(1)
    layers = linears(model)
    wanted = collect_moments(model, layers, batches, ALL, loss_function=item_losses)
    assert_equal_moments(collect_moments(model, layers, batches, ALL), wanted)

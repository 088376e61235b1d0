"""Moments against backpropagation by hand in numpy, and against captured activations."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from hf_lowrank import losses, statistics
from hf_lowrank.decomposition.metrics import METRICS, MetricSettings
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.losses import IGNORED, ItemLosses, item_losses
from hf_lowrank.modeling_lowrank import linear_shape
from hf_lowrank.statistics import collect_moments
from hf_lowrank.targets import linear_weight
from tiny_models import (
    build,
    sentence_batches,
    seq2seq_batches,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    token_batches,
    written_batches,
)

ALL = frozenset({"input", "input_centred", "output", "input_abs", "gradient_rows", "gradient"})
SECOND = frozenset({"input", "input_centred", "output"})
SIZES = (6, 4, 5, 5)
LENGTHS = (7, 3, 5, 6)


class Net(nn.Module):
    """Three layers, wide, tall and square, with biases; positions do not see each other."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        rng = np.random.default_rng(0)
        self.layers = nn.ModuleDict()
        for name, columns, rows in zip(("wide", "tall", "square"), SIZES, SIZES[1:], strict=False):
            weight, bias = rng.normal(size=(rows, columns)), rng.normal(size=rows)
            self.layers[name] = made = (
                nn.Linear(columns, rows) if layer is nn.Linear else Conv1D(rows, columns)
            )
            stored = weight if layer is nn.Linear else weight.T
            with torch.no_grad():
                made.weight.copy_(torch.from_numpy(stored))
                made.bias.copy_(torch.from_numpy(bias))
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs, attention_mask=None):
        hidden = self.layers["wide"](inputs).tanh()
        hidden = self.layers["tall"](self.dropout(hidden)).tanh()
        return self.layers["square"](hidden)

    @property
    def targets(self):
        return dict(self.layers.items())


def net_loss(model, batch):
    """Cross-entropy summed over the unmasked positions of each sequence."""
    logits = model(batch["inputs"], batch.get("attention_mask"))
    found = F.cross_entropy(logits.mT, batch["labels"], reduction="none")
    mask = batch.get("attention_mask", torch.ones_like(batch["labels"]))
    return ItemLosses((found * mask).sum(1), mask.sum(1))


def net_batch(padded=True):
    """Four sequences; what stands in the padding is large, so that it shows wherever it leaks."""
    rng = np.random.default_rng(1)
    inputs = torch.from_numpy(rng.normal(size=(4, 7, 6)).astype("float32"))
    labels = torch.from_numpy(rng.integers(0, 5, size=(4, 7)))
    batch = {"inputs": inputs, "labels": labels}
    if padded:
        batch["attention_mask"] = torch.zeros(4, 7, dtype=torch.long)
        for row, length in enumerate(LENGTHS):
            batch["attention_mask"][row, :length] = 1
            inputs[row, length:] = 100.0
    return batch


def by_hand(net, batch):
    """Layer name: (W, x, g, sequence of each token), by backpropagation written out in numpy."""
    weights = [linear_weight(layer).double().numpy() for layer in net.targets.values()]
    biases = [layer.bias.detach().double().numpy() for layer in net.targets.values()]
    mask = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool().numpy()
    x = batch["inputs"].double().numpy()[mask]
    labels, sequence = batch["labels"].numpy()[mask], np.nonzero(mask)[0]
    h1 = np.tanh(x @ weights[0].T + biases[0])
    h2 = np.tanh(h1 @ weights[1].T + biases[1])
    logits = h2 @ weights[2].T + biases[2]
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g3 = softmax - np.eye(5)[labels]
    g2 = (g3 @ weights[2]) * (1 - h2**2)
    g1 = (g2 @ weights[1]) * (1 - h1**2)
    inputs, gradients = (x, h1, h2), (g1, g2, g3)
    return {
        name: (weights[i], inputs[i], gradients[i], sequence) for i, name in enumerate(net.targets)
    }


def collect_net(net, batches, needs=ALL, **options):
    return collect_moments(net, net.targets, batches, needs, loss_function=net_loss, **options)


@pytest.fixture(params=[nn.Linear, Conv1D], ids=["linear", "conv1d"])
def net(request):
    return Net(request.param)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_second_moments_of_inputs_equal_those_by_hand(net, padded):
    moments, wanted = collect_net(net, [net_batch(padded)]), by_hand(net, net_batch(padded))
    for name, (W, x, _, _) in wanted.items():
        found, image = moments[name].input, x @ W.T if name == "wide" else x
        assert found.is_projected == (name == "wide")
        assert found.size == x.shape[1]
        assert found.squares == pytest.approx((x**2).sum(), rel=1e-5)
        assert found.mean_diagonal == pytest.approx(np.diag(x.T @ x).mean(), rel=1e-5)
        np.testing.assert_allclose(found.matrix, image.T @ image, rtol=1e-4, atol=1e-4)
        assert found.matrix.dtype == torch.float32


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_centred_moments_leave_out_the_mean_of_each_sequence(net, padded):
    moments, wanted = collect_net(net, [net_batch(padded)]), by_hand(net, net_batch(padded))
    for name, (W, x, _, sequence) in wanted.items():
        parts = [x[sequence == s] for s in range(len(LENGTHS))]
        centred = np.concatenate([part - part.mean(0) for part in parts])
        found, image = moments[name].input_centred, centred @ W.T if name == "wide" else centred
        assert found.is_projected == (name == "wide")
        assert found.squares == pytest.approx((centred**2).sum(), rel=1e-5)
        np.testing.assert_allclose(found.matrix, image.T @ image, rtol=1e-4, atol=1e-4)
        assert np.abs(found.matrix.numpy() - moments[name].input.matrix.numpy()).max() > 0.1


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_second_moments_of_gradients_equal_those_by_hand(net, padded):
    moments, wanted = collect_net(net, [net_batch(padded)]), by_hand(net, net_batch(padded))
    for name, (W, _, g, _) in wanted.items():
        found, image = moments[name].output, g @ W if name == "tall" else g
        assert found.is_projected == (name == "tall")
        assert found.size == g.shape[1]
        assert found.squares == pytest.approx((g**2).sum(), rel=1e-5)
        np.testing.assert_allclose(found.matrix, image.T @ image, rtol=1e-4, atol=1e-5)
        assert found.matrix.dtype == torch.float32


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_first_order_statistics_equal_those_by_hand(net, padded):
    moments, wanted = collect_net(net, [net_batch(padded)]), by_hand(net, net_batch(padded))
    for name, (_, x, g, sequence) in wanted.items():
        found = moments[name]
        np.testing.assert_allclose(found.input_abs, np.abs(x).sum(0), rtol=1e-5)
        np.testing.assert_allclose(found.gradient, g.T @ x, rtol=1e-4, atol=1e-5)
        squares = sum(
            ((g[sequence == s].T @ x[sequence == s]) ** 2).sum(1) for s in range(len(LENGTHS))
        )
        np.testing.assert_allclose(found.gradient_rows, squares, rtol=1e-4, atol=1e-6)
        assert np.abs(((g.T @ x) ** 2).sum(1) - squares).max() > 0.1
        assert found.input_abs.dtype == found.gradient_rows.dtype == torch.float32


@pytest.mark.parametrize(("padded", "tokens"), [(False, 28), (True, sum(LENGTHS))])
def test_tokens_and_losses_are_counted(net, padded, tokens):
    for moment in collect_net(net, [net_batch(padded)]).values():
        assert (moment.tokens, moment.losses) == (tokens, tokens)


@pytest.mark.parametrize("needs", [{field} for field in sorted(ALL)], ids=sorted(ALL))
def test_only_what_is_asked_for_is_collected(needs):
    net, batch = Net(), net_batch()
    everything = collect_net(net, [batch])
    for name, moment in collect_net(net, [batch], frozenset(needs)).items():
        for field in ALL:
            found, wanted = getattr(moment, field), getattr(everything[name], field)
            if field not in needs:
                assert found is None
            elif field in SECOND:
                assert torch.allclose(found.matrix, wanted.matrix)
                assert found.squares == pytest.approx(wanted.squares)
            else:
                assert torch.allclose(found, wanted)


def split(batch, size):
    return [
        {name: value[start : start + size] for name, value in batch.items()}
        for start in range(0, len(batch["labels"]), size)
    ]


def assert_equal_moments(found, wanted):
    assert found.keys() == wanted.keys()
    for name, first in found.items():
        second = wanted[name]
        assert (first.tokens, first.losses) == (second.tokens, second.losses)
        for field in sorted(SECOND):
            one, other = getattr(first, field), getattr(second, field)
            assert one.squares == pytest.approx(other.squares, rel=1e-4)
            tolerance = 1e-5 * float(other.matrix.abs().max())
            assert torch.allclose(one.matrix, other.matrix, rtol=1e-4, atol=tolerance), name
        for field in ("input_abs", "gradient_rows", "gradient"):
            one, other = getattr(first, field), getattr(second, field)
            tolerance = 1e-5 * float(other.abs().max())
            assert torch.allclose(one, other, rtol=1e-4, atol=tolerance), (name, field)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_of_any_size_give_the_same_moments(size):
    net, batch = Net(), net_batch()
    assert_equal_moments(collect_net(net, split(batch, size)), collect_net(net, [batch]))


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


@pytest.mark.parametrize("block", [1, 2, 3])
def test_matrices_summed_in_blocks_are_symmetric_and_the_same(monkeypatch, block):
    whole = collect_net(Net(), [net_batch()])
    monkeypatch.setattr(statistics, "_BLOCK", block)
    blocks = collect_net(Net(), split(net_batch(), 2))
    assert_equal_moments(blocks, whole)
    for moment in blocks.values():
        for second in (moment.input, moment.output):
            assert torch.equal(second.matrix, second.matrix.T)


def linears(model):
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
        and name not in ("bert.pooler.dense", "classifier")
    }  # fmt: skip


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
    make, batch = MODELS[name][0](), MODELS[name][1]()
    layers = linears(make)
    wanted, count = captured(make, layers, batch)
    moments = collect_moments(make, layers, [batch], ALL)
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


def assert_close(found, wanted):
    scale = float(wanted.abs().max())
    assert scale > 1e-6
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * scale)


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


def attention(model, part):
    return f"model.layers.1.self_attn.{part}_proj"


def test_layers_that_read_the_same_tensor_share_one_moment():
    model = tiny_llama(num_key_value_heads=4)
    moments = collect_moments(model, linears(model), token_batches(2), SECOND)
    q, k, v = (moments[attention(model, part)].input for part in "qkv")
    assert q is k
    assert k is v
    up, gate = (moments[f"model.layers.1.mlp.{part}_proj"].input for part in ("up", "gate"))
    assert up is gate
    assert len({id(moment.input) for moment in moments.values()}) == 2 * 4
    assert len({id(moment.output) for moment in moments.values()}) == 2 * 7


def test_a_shared_moment_is_summed_once():
    model, batches = tiny_llama(num_key_value_heads=4), token_batches(2)
    layers = linears(model)
    together = collect_moments(model, layers, batches, SECOND)
    for name in (attention(model, "v"), "model.layers.0.mlp.up_proj"):
        alone = collect_moments(model, {name: layers[name]}, batches, SECOND)[name]
        assert_close(together[name].input.matrix, alone.input.matrix)
        assert together[name].input.squares == pytest.approx(alone.input.squares)


@pytest.mark.parametrize("order", list(itertools.permutations("qkv")), ids="".join)
def test_wide_layers_keep_moments_of_their_own(order):
    """With grouped queries k and v hold images, which q cannot use, nor they each other's."""
    model, batches = tiny_llama(), token_batches(1)
    layers = {attention(model, part): model.get_submodule(attention(model, part)) for part in order}
    moments = collect_moments(model, layers, batches, ALL)
    for name, layer in layers.items():
        alone = collect_moments(model, {name: layer}, batches, ALL)
        assert_equal_moments({name: moments[name]}, alone)


class Alternating(nn.Module):
    """Two layers that read the same tensor only while `together`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.together = True

    def forward(self, inputs):
        other = inputs if self.together else inputs + 1
        self.together = False
        return self.first(inputs) + self.second(other)


def test_layers_that_share_an_input_only_at_times_are_refused():
    model = Alternating()
    layers = {"first": model.first, "second": model.second}
    message = "^second: shared its input with first in one batch and with second in another"
    with pytest.raises(NumericalError, match=message):
        collect_moments(model, layers, [{"inputs": torch.ones(2, 3)}] * 2, frozenset({"input"}))


class Routed(nn.Module):
    """A layer that sees some of the tokens only, as an expert does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, inputs):
        return self.layer(inputs[:, 1:].flatten(0, 1)[:7])


def test_a_layer_that_sees_some_of_the_tokens_keeps_the_exact_gradient():
    """Seven tokens of two sequences: which belongs to which is not known."""
    model, inputs = Routed(), torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        return ItemLosses(model(batch["inputs"]).square().sum()[None], torch.tensor([7]))

    moments = collect_moments(
        model, {"layer": model.layer}, [{"inputs": inputs}], ALL, loss_function=loss
    )
    loss(model, {"inputs": inputs}).sums.sum().backward()
    assert_close(moments["layer"].gradient, model.layer.weight.grad)
    assert (moments["layer"].gradient_rows > 0).all()
    assert moments["layer"].tokens == 7


class Twice(nn.Module):
    """One layer that is called twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs):
        return self.layer(self.layer(inputs))


def test_a_layer_that_is_called_twice_counts_twice():
    model, inputs = Twice(), torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    moments = collect_moments(
        model, {"layer": model.layer}, [{"inputs": inputs}], frozenset({"input"})
    )
    with torch.no_grad():
        both = torch.cat([inputs, model.layer(inputs)]).flatten(0, 1)
    assert moments["layer"].tokens == 20
    assert_close(moments["layer"].input.matrix, both.T @ both)


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        torch.get_rng_state().tolist(),
    )


def half_frozen_net():
    net = Net().train()
    net.layers["tall"].eval()
    net.layers["wide"].weight.requires_grad_(False)
    net.layers["square"].bias.grad = torch.ones(5)
    net.layers["tall"].register_forward_hook(lambda *call: None)
    return net


@pytest.mark.parametrize("label_source", ["data", "model"])
@pytest.mark.parametrize("needs", [ALL, frozenset({"input"})], ids=["all", "input"])
def test_the_model_is_left_as_it_was(needs, label_source):
    net = half_frozen_net()
    before, weights = state_of(net), {k: v.clone() for k, v in net.state_dict().items()}
    collect_net(net, split(net_batch(), 2), needs, label_source=label_source)
    assert state_of(net) == before
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.layers["square"].bias.grad, torch.ones(5))
    assert all(p.grad is None for p in net.parameters() if p is not net.layers["square"].bias)


@pytest.mark.parametrize("where", ["loss", "batch", "backward", "progress"])
def test_the_model_is_left_as_it_was_after_an_exception(where):
    net = half_frozen_net()
    before = state_of(net)

    def fail(*_):
        raise KeyboardInterrupt(where)

    def loss(model, batch):
        result = net_loss(model, batch)
        if where == "loss":
            fail()
        if where == "backward":
            result.sums.register_hook(fail)
        return result

    def batches():
        yield net_batch()
        if where == "batch":
            fail()

    on_batch = fail if where == "progress" else None
    with pytest.raises(KeyboardInterrupt, match=where):
        collect_moments(net, net.targets, batches(), ALL, loss_function=loss, on_batch=on_batch)
    assert state_of(net) == before
    assert torch.equal(net.layers["square"].bias.grad, torch.ones(5))


def test_the_forward_pass_is_that_of_evaluation():
    """The net has dropout; the moments have no noise."""
    moments = [collect_net(Net().train(), [net_batch()], seed=seed) for seed in (0, 1)]
    assert_equal_moments(*moments)


def test_progress_is_told_after_each_batch():
    calls = []
    collect_net(Net(), split(net_batch(), 1), on_batch=lambda: calls.append(1))
    assert len(calls) == 4


def test_a_layer_that_is_never_reached_is_named():
    net = Net()
    targets = {**net.targets, "lost.b": nn.Linear(2, 2), "lost.a": nn.Linear(2, 2)}
    message = "^No calibration token reached lost.a, lost.b; exclude these layers or use data that"
    with pytest.raises(DataError, match=message):
        collect_moments(net, targets, [net_batch()], ALL, loss_function=net_loss)


def test_a_layer_that_only_sees_padding_is_named():
    net, batch = Net(), net_batch()
    batch["attention_mask"].zero_()
    with pytest.raises(DataError, match=r"^No calibration token reached square, tall, wide;"):
        collect_net(net, [batch], frozenset({"input"}))


@pytest.mark.parametrize("needs", [ALL, frozenset({"input"})], ids=["all", "input"])
def test_no_batch_is_an_error(needs):
    with pytest.raises(DataError, match=r"^The calibration data holds no batch.$"):
        collect_net(Net(), [], needs)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_an_error(bad):
    def loss(model, batch):
        result = net_loss(model, batch)
        return ItemLosses(result.sums + float(bad), result.counts)

    net = Net()
    with pytest.raises(NumericalError, match=f"^The calibration loss is {bad}, not a number.$"):
        collect_moments(net, net.targets, [net_batch()], ALL, loss_function=loss)


def test_weights_that_are_not_finite_show_in_the_loss():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"^The calibration loss is nan, not a number.$"):
        collect_moments(model, linears(model), token_batches(1), SECOND)


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


class LinearSoftmax(nn.Module):
    """One linear layer and a softmax, on independent inputs."""

    def __init__(self, classes=6, features=8, scale=0.15):
        super().__init__()
        self.config = SimpleNamespace()
        rng = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(features, classes)
        with torch.no_grad():
            scales = torch.linspace(2.0, 0.2, features)
            self.layer.weight.copy_(scale * scales * torch.randn(classes, features, generator=rng))
            self.layer.bias.copy_(torch.randn(classes, generator=rng))

    def forward(self, inputs):
        return SimpleNamespace(logits=self.layer(inputs))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_price_is_the_rise_of_the_loss_of_a_linear_softmax(rank):
    """Where the Kronecker factors are nearly exact: within 15 % of KL(dense || truncated)."""
    model = LinearSoftmax()
    inputs = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1))
    moments = collect_moments(
        model, {"layer": model.layer}, [{"inputs": inputs}], SECOND, label_source="model"
    )
    settings = MetricSettings(input_damping=1e-4, output_damping=1e-4)
    spectrum = decompose(
        model.layer.weight.detach(), METRICS["kfac"].form(moments["layer"], settings)
    )
    with torch.no_grad():
        before = model(inputs).logits.log_softmax(dim=-1)
        A, B = spectrum.factors(rank)
        after = (inputs @ (B @ A).T + model.layer.bias).log_softmax(dim=-1)
        rise = float((before.exp() * (before - after)).sum(dim=-1).mean())
    assert rise > 1e-5
    assert spectrum.predicted_rise(rank) == pytest.approx(rise, rel=0.15)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
)
def test_the_price_is_near_the_rise_of_the_loss_of_a_language_model(name):
    """On its own text, where the loss is least: within a factor of 2 either way."""
    model = tiny_llama(tie_word_embeddings=False)
    batches = written_batches(model, 8, 16, 24)
    layer = model.get_submodule(name)
    moments = collect_moments(model, {name: layer}, batches, SECOND, label_source="model")
    settings = MetricSettings(input_damping=1e-4, output_damping=1e-4)
    weight = layer.weight.detach().clone()
    spectrum = decompose(weight, METRICS["kfac"].form(moments[name], settings))
    rank = len(spectrum.sigma) - 8
    before = divergence_base(model, batches)
    with torch.no_grad():
        A, B = spectrum.factors(rank)
        layer.weight.copy_(B @ A)
    after = divergence_base(model, batches)
    rise = float((before.exp() * (before - after)).sum(dim=-1).mean())
    assert rise > 1e-5
    assert 0.5 * rise < spectrum.predicted_rise(rank) < 2 * rise


@torch.no_grad()
def divergence_base(model, batches):
    """Log-probabilities of the next token at every position that has one."""
    logits = [model(**batch).logits[:, :-1].flatten(0, 1) for batch in batches]
    return torch.cat(logits).log_softmax(dim=-1)


def test_the_default_loss_is_the_models_own():
    model, batches = tiny_llama(), token_batches(1)
    layers = linears(model)
    wanted = collect_moments(model, layers, batches, ALL, loss_function=item_losses)
    assert_equal_moments(collect_moments(model, layers, batches, ALL), wanted)

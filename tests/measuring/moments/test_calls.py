"""Layers that share an input, see some of the tokens only, or are called twice."""

import itertools

import pytest
import torch
from torch import nn

from hf_lowrank.errors import NumericalError
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import ItemLosses
from tests.measuring.moments import ALL, SECOND, assert_close, assert_equal_moments, linears
from tests.tiny_models import tiny_llama, token_batches


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

"""What a collection leaves behind, and what it refuses."""

import pytest
import torch
from torch import nn

from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import ItemLosses
from tests.measuring.moments import (
    ALL,
    SECOND,
    Net,
    assert_equal_moments,
    collect_net,
    linears,
    net_batch,
    net_loss,
    split,
)
from tests.tiny_models import tiny_llama, token_batches


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
    with pytest.raises(
        DataError, match=r"^The calibration data holds no batch; pass at least one.$"
    ):
        collect_net(Net(), [], needs)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_an_error(bad):
    def loss(model, batch):
        result = net_loss(model, batch)
        return ItemLosses(result.sums + float(bad), result.counts)

    net = Net()
    with pytest.raises(
        NumericalError, match=f"^The calibration loss is {bad}, not a number; load .* float16.$"
    ):
        collect_moments(net, net.targets, [net_batch()], ALL, loss_function=loss)


def test_weights_that_are_not_finite_show_in_the_loss():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        NumericalError, match=r"^The calibration loss is nan, not a number; load .* float32"
    ):
        collect_moments(model, linears(model), token_batches(1), SECOND)

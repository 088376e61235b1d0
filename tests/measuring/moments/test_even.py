"""Tokens weighted by what they contribute: `even` moments."""

import pytest
import torch
from torch import nn

from hf_lowrank.decomposition.metrics import METRICS, MetricSettings
from hf_lowrank.decomposition.moments import evenly
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import ItemLosses
from hf_lowrank.measuring.losses import item_losses
from tests.tiny_models import tiny_gpt2, tiny_llama, token_batches

KFAC = METRICS["kfac"]
SETTINGS = MetricSettings(0.0, 0.0, 0.5)


def test_outer_products_stay_and_lengths_are_equal():
    torch.manual_seed(0)
    inputs, gradients = torch.randn(7, 5), torch.randn(7, 3) * torch.logspace(-9, 6, 7)[:, None]
    inputs[3] = 0.0
    x, g, strength = evenly(inputs, gradients)
    for before, after in zip(
        torch.einsum("ti,tj->tij", gradients, inputs), torch.einsum("ti,tj->tij", g, x), strict=True
    ):
        assert torch.allclose(before, after, rtol=1e-4, atol=0.0)
    assert torch.allclose(x.norm(dim=1), g.norm(dim=1), rtol=1e-4)
    assert not x[3].any()
    expected = (inputs.norm(dim=1) * gradients.norm(dim=1)).square().sum()
    assert strength == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (tiny_llama, "model.layers.0.self_attn.o_proj"),
        (tiny_llama, "model.layers.1.mlp.up_proj"),
        (tiny_llama, "model.layers.1.mlp.down_proj"),
        (tiny_gpt2, "transformer.h.1.mlp.c_proj"),
    ],
)
def test_a_single_token_is_priced_exactly(build, name):
    """With one token the curvature is a Kronecker product, whatever the weights."""
    model = build()
    layer = model.get_submodule(name)
    (batch,) = token_batches(1, 1, length=2)  # the second token has no target
    kept = {}

    def keep(module, args, output):
        if output.requires_grad:
            kept["x"] = args[0].detach()[0]
            output.register_hook(lambda gradient: kept.update(g=gradient[0]))

    handle = layer.register_forward_hook(keep)
    item_losses(model, batch).sums.sum().backward()
    handle.remove()
    found = collect_moments(model, {name: layer}, [batch], KFAC.needs, even=True)[name]
    x, g = kept["x"][:1], kept["g"][:1]
    product = float(x.square().sum() * g.square().sum())
    assert found.strength == pytest.approx(product, rel=1e-3)
    form = KFAC.form(found, SETTINGS)
    share = product / (found.input.squares * found.output.squares)
    assert form.price_scale == pytest.approx(share / 2, rel=1e-3)
    assert found.input.squares == pytest.approx(found.output.squares, rel=1e-3)


def test_the_trace_of_the_curvature_is_kept():
    model, name = tiny_llama(), "model.layers.0.self_attn.q_proj"
    batches = token_batches(3, 4, padding=5)
    layer = model.get_submodule(name)
    even = collect_moments(model, {name: layer}, batches, KFAC.needs, even=True)[name]
    plain = collect_moments(model, {name: layer}, batches, KFAC.needs)[name]
    assert plain.strength is None
    assert (even.tokens, even.losses) == (plain.tokens, plain.losses)
    scale = KFAC.form(even, SETTINGS).price_scale * 2 * even.losses
    assert scale * even.input.squares * even.output.squares == pytest.approx(even.strength)
    trace = even.input.matrix.diagonal().sum()
    assert float(trace) == pytest.approx(even.input.squares, rel=1e-4)
    assert even.input.squares == pytest.approx(even.output.squares, rel=1e-4)


def test_a_token_with_a_tiny_input_and_a_huge_gradient_does_not_rule_the_outputs():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.inner(x)

    slopes = torch.eye(6).repeat(4, 1)[:21]
    slopes[0] = 1e4 * torch.eye(6)[0]  # this token's input is 1e-4 long, so it does as the others

    def loss(model, batch):
        total = (model(batch["x"]) * slopes).sum(dim=(1, 2))
        return ItemLosses(total, torch.ones(1, dtype=torch.long))

    x = torch.nn.functional.normalize(torch.randn(1, 21, 6), dim=-1)
    x[0, 0] *= 1e-4
    model = Scaled()
    shares = []
    for even in (False, True):
        moments = collect_moments(
            model, {"inner": model.inner}, [{"x": x}], KFAC.needs, loss_function=loss, even=even
        )
        output = moments["inner"].output.matrix
        shares.append(float(output[0, 0] / output.diagonal().sum()))
    assert shares[0] > 0.99
    assert shares[1] == pytest.approx(4 / 21, rel=1e-3)


def test_whole_inputs_are_weighted_alike():
    model, name = tiny_llama(), "model.layers.1.mlp.down_proj"
    layer, batches = model.get_submodule(name), token_batches(2)
    images = collect_moments(model, {name: layer}, batches, KFAC.needs, even=True)[name]
    whole = collect_moments(model, {name: layer}, batches, KFAC.needs, whole=[name], even=True)[
        name
    ]
    assert whole.input_whole.matrix.shape == (64, 64)
    assert torch.allclose(whole.input.matrix, images.input.matrix, rtol=1e-3, atol=1e-5)
    assert whole.input.squares == pytest.approx(images.input.squares, rel=1e-5)

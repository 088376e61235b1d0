"""Prices of components against the measured rise of the loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_lowrank.decomposition.metrics import METRICS, MetricSettings
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.measuring.collection import collect_moments
from tests.measuring.moments import SECOND
from tests.tiny_models import tiny_llama, written_batches


@torch.no_grad()
def log_probabilities(model, batches):
    """Log-probabilities of the next token at every position that has one."""
    logits = [model(**batch).logits[:, :-1].flatten(0, 1) for batch in batches]
    return torch.cat(logits).log_softmax(dim=-1)


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
    settings = MetricSettings(input_damping=1e-4, output_damping=1e-4, activation_alpha=0.5)
    spectrum, factors = decompose(
        model.layer.weight.detach(), METRICS["kfac"].form(moments["layer"], settings)
    )
    with torch.no_grad():
        before = model(inputs).logits.log_softmax(dim=-1)
        A, B = factors.balanced(rank)
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
    settings = MetricSettings(input_damping=1e-4, output_damping=1e-4, activation_alpha=0.5)
    weight = layer.weight.detach().clone()
    spectrum, factors = decompose(weight, METRICS["kfac"].form(moments[name], settings))
    rank = len(spectrum.sigma) - 8
    before = log_probabilities(model, batches)
    with torch.no_grad():
        A, B = factors.balanced(rank)
        layer.weight.copy_(B @ A)
    after = log_probabilities(model, batches)
    rise = float((before.exp() * (before - after)).sum(dim=-1).mean())
    assert rise > 1e-5
    assert 0.5 * rise < spectrum.predicted_rise(rank) < 2 * rise

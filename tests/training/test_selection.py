"""Spectra of layers in training, and the ranks chosen from them."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import MetricSettings
from hf_lowrank.errors import ConfigError, NumericalError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.training.form_changes import to_training_form_
from hf_lowrank.training.selection import SelectionSettings, layer_spectra, select_ranks
from hf_lowrank.training.truncation import get_factors
from tests.tiny_models import (
    Batch,
    sentence_batches,
    tiny_bert_classifier,
    tiny_llama,
    token_batches,
)

UNDAMPED = MetricSettings(input_damping=0.0, output_damping=0.0, activation_alpha=0.5)
DAMPED = MetricSettings(input_damping=0.01, output_damping=0.1, activation_alpha=0.5)
CASES = {
    "bert": (tiny_bert_classifier, ["query", "output.dense", "intermediate.dense"]),
    "llama": (tiny_llama, ["q_proj", "k_proj", "up_proj", "down_proj"]),
}


def settings(rule: str, tolerance: float = 0.02, **changes: Any) -> SelectionSettings:
    chosen = {
        "precision": 0.01, "smallest_ratio": 0.02, "label_source": "model", "seed": 0,
        "damping": DAMPED,
    }  # fmt: skip
    return SelectionSettings(rule, tolerance, **(chosen | changes))


def batches_of(name: str) -> list[Batch]:
    return sentence_batches(8) if name == "bert" else token_batches(8, padding=3)


def trained(name: str, rank: int | None = None) -> tuple:
    """A model with some layers in training form, their factors no longer orthonormal."""
    build, targets = CASES[name]
    model = build()
    pattern = {} if rank is None else dict.fromkeys(targets, rank)
    layers = to_training_form_(model, LowRankConfig(target_modules=targets, rank_pattern=pattern))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers.values():
            for parameter in (layer.lowrank_A.weight, layer.lowrank_B.weight, layer.lowrank_s):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * parameter.abs().mean() * noise)
    return model, layers


@pytest.mark.parametrize("name", CASES)
def test_thin_spectra_are_the_svd_of_the_product(name: str):
    model, layers = trained(name)
    spectra, factors = layer_spectra(model, layers, [], settings("relative"))
    for key, layer in layers.items():
        weight = layer.dense_weight().detach().double()
        U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
        found = spectra[key]
        torch.testing.assert_close(found.sigma, s, atol=1e-5, rtol=1e-4)
        best = (U[:, :7] * s[:7]) @ Vh[:7]
        torch.testing.assert_close(factors[key].product(7).double(), best, atol=1e-4, rtol=1e-3)
        assert found.price is None


def by_hand(
    model: nn.Module, layers: dict[str, LowRankLinear], batches: list[Batch]
) -> dict[str, torch.Tensor]:
    """Prices of each layer's dense weight: `C` and `G` of tokens that z and g weigh evenly."""
    rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in layers}
    losses = 0
    for batch in batches:
        mask = batch["attention_mask"].bool()

        def keep(layer, args, output, name, mask=mask):
            x = args[0].detach()[mask].double()
            output.register_hook(lambda g: rows[name].append((x, g[mask].double())))

        handles = [
            layer.register_forward_hook(partial(keep, name=name)) for name, layer in layers.items()
        ]
        found = item_losses(model, batch)
        found.sums.sum().backward()
        losses += int(found.counts.sum())
        for handle in handles:
            handle.remove()
    prices = {}
    for name, layer in layers.items():
        x, g = (torch.cat(parts) for parts in zip(*rows[name], strict=True))
        _, s, V = (part.detach().double() for part in get_factors(layer))
        z, size = (x @ V.T * s).norm(dim=1), g.norm(dim=1)
        weight = torch.where(z > 0, size / z, 0.0)
        C = x.T @ (weight[:, None] * x)
        G = g.T @ (torch.where(size > 0, z / size, 0.0)[:, None] * g)
        W = layer.dense_weight().detach().double()
        squares = torch.linalg.eigvals(G @ W @ C @ W.T).real.sort(descending=True).values
        share = (z * size).square().sum() / (z * size).sum() ** 2
        prices[name] = squares * share / (2 * losses)
    return prices


@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("name", CASES)
def test_prices_are_those_of_the_dense_layer_in_its_own_moments(name: str, rank: int | None):
    model, layers = trained(name, rank)
    batches = batches_of(name)
    found, factors = layer_spectra(
        model, layers, batches, settings("price", label_source="data", damping=UNDAMPED)
    )
    whole = by_hand(model.eval(), layers, batches)
    for key, layer in layers.items():
        size = min(layer.rank, len(whole[key]))
        scale = whole[key].max().item()
        assert scale > 0
        torch.testing.assert_close(
            found[key].price[:size].double(), whole[key][:size], atol=2e-4 * scale, rtol=5e-3
        )
        assert whole[key][size:].sum().item() < 1e-3 * scale
        torch.testing.assert_close(
            factors[key].product(layer.rank),
            layer.dense_weight().detach(),
            atol=2e-3, rtol=1e-2,
        )  # fmt: skip


def test_collecting_prices_leaves_no_trace():
    model, layers = trained("bert")
    model.train()
    before = [p.detach().clone() for p in model.parameters()]
    layer_spectra(model, layers, batches_of("bert"), settings("price"))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


@pytest.mark.parametrize("rule", ["relative", "price"])
def test_a_selection_edits_nothing(rule: str):
    model, layers = trained("bert")
    batches = batches_of("bert")
    before = [p.detach().clone() for p in model.parameters()]
    reference = measure_loss(model, batches).items
    found = select_ranks(model, layers, batches, reference, settings(rule, 0.05))
    assert any(rank is not None for rank in found.plan.ranks.values())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert found.decompositions == len(layers)
    assert found.loss_passes == len(found.probes) + (rule == "price")


def test_the_relative_rule_keeps_what_reaches_the_threshold():
    """The whole of Algorithm 1 by hand on the spectra: the last feasible delta, none beyond it."""
    model, layers = trained("llama")
    batches = token_batches(8)
    reference = measure_loss(model, batches)
    found = select_ranks(model, layers, batches, reference.items, settings("relative", 0.1))
    sigma = {n: torch.linalg.svdvals(m.dense_weight().double()) for n, m in layers.items()}

    def ranks_at(delta: float) -> dict[str, int | None]:
        ranks: dict[str, int | None] = {}
        for name, s in sigma.items():
            rows, columns = layers[name].out_features, layers[name].in_features
            rank = max(1, int((s / s[0] >= delta).sum()))
            ranks[name] = rank if rank * (rows + columns) < rows * columns else None
        return ranks

    def rise(ranks: dict[str, int | None]) -> float:
        cut = copy.deepcopy(model)
        for name, rank in ranks.items():
            if rank is not None:
                U, s, V = torch.linalg.svd(
                    layers[name].dense_weight().double(), full_matrices=False
                )
                dense = layers[name].to_dense()
                dense.weight.data = ((U[:, :rank] * s[:rank]) @ V[:rank]).float()
                cut.set_submodule(name, dense)
        return measure_loss(cut, batches).mean - reference.mean

    low, high = 0.0, 1.0
    while high - low > 0.01:
        delta = (low + high) / 2
        low, high = (delta, high) if rise(ranks_at(delta)) <= 0.1 else (low, delta)
    assert 0.0 < low < 1.0
    assert dict(found.plan.ranks) == ranks_at(low)


def test_a_budget_is_spent_without_measuring():
    model, layers = trained("bert")
    for rule in ("relative", "price"):
        batches = batches_of("bert") if rule == "price" else []
        found = select_ranks(model, layers, batches, [], settings(rule, param_ratio=0.3))
        assert 0.27 < found.plan.param_ratio <= 0.3
        assert not found.probes


def test_layers_cut_before_are_cut_on_and_never_grow():
    model, layers = trained("llama", rank=6)
    batches = token_batches(8)
    reference = measure_loss(model, batches).items
    for rule in ("relative", "price"):
        found = select_ranks(model, layers, batches, reference, settings(rule, 0.2))
        assert all(rank is not None and rank <= 6 for rank in found.plan.ranks.values())
        assert any(rank < 6 for rank in found.plan.ranks.values())


def test_an_unknown_rule_is_refused():
    model, layers = trained("bert")
    with pytest.raises(ConfigError, match="must be relative or price, got 'energy'"):
        layer_spectra(model, layers, [], settings("energy"))


def test_factors_that_are_not_finite_are_refused_by_name():
    model, layers = trained("bert")
    name = next(iter(layers))
    layers[name].lowrank_s.data[0] = float("nan")
    advice = "Lower the learning rate, or exclude the layer."
    with pytest.raises(NumericalError, match=f"^{name}: the weight holds NaN or .*. {advice}$"):
        layer_spectra(model, layers, [], settings("relative"))


def test_factors_are_not_copied():
    _, layers = trained("bert")
    layer = next(iter(layers.values()))
    assert get_factors(layer)[0].data_ptr() == layer.lowrank_B.weight.data_ptr()


def test_labels_of_the_curvature_are_drawn_from_the_model_and_seeded():
    model, layers = trained("bert", None)
    batches = batches_of("bert")

    def prices(**changes: Any) -> list[torch.Tensor]:
        found, _ = layer_spectra(model, layers, batches, settings("price", **changes))
        return [spectrum.price for spectrum in found.values()]

    sampled, again, other = prices(seed=1), prices(seed=1), prices(seed=2)
    data = prices(label_source="data")
    assert all(torch.equal(a, b) for a, b in zip(sampled, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(sampled, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(sampled, data, strict=True))

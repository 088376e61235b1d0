"""Cuts: the parameters, the optimizer's moments, and the way back from a probe."""

import pytest
import torch
from torch import nn

from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.decomposition.thin import thin_svd
from hf_lowrank.errors import NumericalError
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.training.truncation import (
    cut_factors,
    get_factors,
    make_dense_,
    probed,
    set_factors_,
    truncate_,
)
from tests.training import training_layer

LEARNING_RATE = 1e-2


def factors_of(layer: LowRankLinear) -> Factors:
    U, s, V = get_factors(layer)
    left, sigma, right = thin_svd(U * s, V)
    return Factors(left * sigma, right)


def shuffled(layer: LowRankLinear) -> LowRankLinear:
    """The same product with its components in another order and some signs in the spectrum."""
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    U, s, V = (part.clone() for part in get_factors(layer))
    set_factors_(layer, (U[:, order] * signs, s[order] * signs, V[order]))
    return layer


def step(layer: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 6, generator=generator)
    goal = torch.randn(16, 8, generator=generator)
    optimizer.zero_grad()
    (layer(inputs) - goal).square().mean().backward()
    optimizer.step()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0, amsgrad=True, weight_decay=0.0),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_of_orthonormal_factors_turn_with_the_basis(kind: str):
    """The same as if the moments had been gathered in the turned basis from the start."""
    cut = shuffled(training_layer())
    turned = shuffled(training_layer())
    U, s, V = cut_factors(factors_of(turned), 6)  # all components, sorted
    # Both sides turn, by signs of their own, which say nothing about the spectrum.
    flips = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    U, V = U * flips, flips[:, None] * V
    set_factors_(turned, (U, s, V))
    assert not torch.allclose(cut.lowrank_s, turned.lowrank_s)
    optimizers = [OPTIMIZERS[kind](layer.parameters()) for layer in (cut, turned)]
    for seed in range(3):  # a rate of 0: moments gather, the factors stay orthonormal
        for layer, optimizer in zip((cut, turned), optimizers, strict=True):
            step(layer, optimizer, seed)
    truncate_(cut, (U[:, :4], s[:4], V[:4]), optimizers[0])
    set_factors_(turned, (U[:, :4], s[:4], V[:4]))
    for parameter, rows in (
        (turned.lowrank_B.weight, (slice(None), slice(4))),
        (turned.lowrank_A.weight, (slice(4),)),
        (turned.lowrank_s, (slice(4),)),
    ):
        state = optimizers[1].state[parameter]
        for name, value in state.items():
            if value.ndim:
                state[name] = value[rows].clone()
    for name in ("lowrank_B.weight", "lowrank_A.weight", "lowrank_s", "lowrank_B.bias"):
        found = optimizers[0].state[cut.get_parameter(name)]
        expected = optimizers[1].state[turned.get_parameter(name)]
        assert set(found) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-4)
    for layer, optimizer in zip((cut, turned), optimizers, strict=True):
        set_rate(optimizer, LEARNING_RATE)
        step(layer, optimizer, 7)
        assert layer.rank == 4
    torch.testing.assert_close(cut.dense_weight(), turned.dense_weight(), atol=1e-5, rtol=1e-4)
    assert float((cut.dense_weight() - training_layer().dense_weight()).detach().norm()) > 0.01


def test_moments_are_only_sliced_where_the_basis_does_not_turn():
    layer = training_layer()
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    step(layer, optimizer, 0)
    before = {
        n: {k: v.clone() for k, v in optimizer.state[p].items()}
        for n, p in layer.named_parameters()
    }
    U, s, V = (part.clone() for part in get_factors(layer))
    truncate_(layer, (U[:, :3], s[:3], V[:3]), optimizer)
    for name, rows in (
        ("lowrank_B.weight", (slice(None), slice(3))),
        ("lowrank_A.weight", (slice(3),)),
        ("lowrank_s", (slice(3),)),
        ("lowrank_B.bias", (slice(None),)),
    ):
        state = optimizer.state[layer.get_parameter(name)]
        assert torch.equal(state["step"], before[name]["step"])
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            torch.testing.assert_close(state[key], before[name][key][rows], atol=1e-8, rtol=1e-5)
            assert state[key].dtype == torch.float32


def test_second_moments_stay_positive_under_any_turn():
    layer = training_layer()
    with torch.no_grad():
        layer.lowrank_B.weight.add_(0.3 * training_layer(seed=1).lowrank_B.weight)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    step(layer, optimizer, 0)
    truncate_(layer, cut_factors(factors_of(layer), 3), optimizer)
    for parameter in layer.parameters():
        assert bool((optimizer.state[parameter]["exp_avg_sq"] >= 0).all())
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    set_rate(optimizer, LEARNING_RATE)
    step(layer, optimizer, 1)
    assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())


def test_a_cut_is_the_best_approximation_and_keeps_parameters_and_bias():
    layer = shuffled(training_layer())
    weight, bias = layer.dense_weight().detach(), layer.bias.detach().clone()
    ids = [id(parameter) for parameter in layer.parameters()]
    layer.lowrank_s.grad = torch.ones(6)
    truncate_(layer, cut_factors(factors_of(layer), 2))
    assert layer.rank == layer.lowrank_A.out_features == layer.lowrank_B.in_features == 2
    tail = torch.linalg.svdvals(weight)[2:].norm()
    torch.testing.assert_close((layer.dense_weight() - weight).norm().detach(), tail)
    assert torch.equal(layer.bias, bias)
    assert [id(parameter) for parameter in layer.parameters()] == ids
    assert layer.lowrank_s.grad is None
    assert layer.lowrank_A.weight.requires_grad
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.lowrank_s.grad.shape == (2,)


def test_a_cut_before_the_first_step_needs_no_moments():
    layer = training_layer()
    optimizer = torch.optim.AdamW(layer.parameters())
    truncate_(layer, cut_factors(factors_of(layer), 2), optimizer)
    assert not any(optimizer.state.get(parameter) for parameter in layer.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_leaves_every_bit_as_it_was(fails: bool):
    layers = {"a": shuffled(training_layer(seed=0)), "b": training_layer(seed=1)}
    before = {n: [p.detach().clone() for p in layer.parameters()] for n, layer in layers.items()}
    factors = {name: factors_of(layer) for name, layer in layers.items()}

    def probe() -> None:
        with probed(layers, factors, {"a": 2, "b": None}):
            assert (layers["a"].rank, layers["b"].rank) == (2, 6)
            torch.testing.assert_close(
                layers["a"].dense_weight(),
                factors["a"].product(2).float(),
            )
            if fails:
                raise InterruptedError

    if fails:
        with pytest.raises(InterruptedError):
            probe()
    else:
        probe()
    for name, layer in layers.items():
        assert layer.rank == layer.lowrank_A.out_features == layer.lowrank_B.in_features == 6
        assert all(
            torch.equal(p, b) and p.stride() == b.stride()
            for p, b in zip(layer.parameters(), before[name], strict=True)
        )


def test_a_probe_that_fails_half_way_into_its_cuts_restores_all_layers():
    layers = {"a": training_layer(seed=0), "b": training_layer(seed=1)}
    before = [p.detach().clone() for layer in layers.values() for p in layer.parameters()]
    factors = {"a": factors_of(layers["a"])}
    with pytest.raises(KeyError), probed(layers, factors, {"a": 2, "b": 2}):
        pass
    after = [p for layer in layers.values() for p in layer.parameters()]
    assert all(torch.equal(p, b) for p, b in zip(after, before, strict=True))


def test_a_layer_multiplied_out_takes_its_place_in_the_optimizer():
    model = nn.Sequential(training_layer(), nn.Linear(8, 2))
    layer = model[0]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
    )
    step(model[:1], optimizer, 0)
    weight, moment = layer.dense_weight().detach(), optimizer.state[layer.bias]["exp_avg"].clone()
    make_dense_(model, "0", layer, optimizer)
    dense = model[0]
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense.weight.detach(), weight)
    assert dense.bias is layer.bias
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert any(parameter is dense.weight for parameter in optimizer.param_groups[0]["params"])
    assert torch.equal(optimizer.state[dense.bias]["exp_avg"], moment)
    assert dense.weight not in optimizer.state
    assert set(optimizer.state) <= set(model.parameters())
    step(model[:1], optimizer, 1)
    assert not torch.equal(dense.weight, weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["old", "new"])
def test_factors_that_are_not_finite_are_refused(part: str, bad: float):
    layer = training_layer()
    cut = cut_factors(factors_of(layer), 3)
    (layer.lowrank_A.weight.data if part == "old" else cut[2])[1, 1] = bad
    with pytest.raises(NumericalError, match="its factors are singular, or hold NaN or infinity"):
        truncate_(layer, cut)
    assert layer.rank == 6


def test_dependent_factors_are_turned_into_the_shortest_combination():
    layer = training_layer()
    with torch.no_grad():
        layer.lowrank_B.weight[:, 1] = layer.lowrank_B.weight[:, 0]
    optimizer = OPTIMIZERS["momentum"](layer.parameters())
    step(layer, optimizer, 0)
    truncate_(layer, cut_factors(factors_of(layer), 3), optimizer)
    for parameter in layer.parameters():
        assert bool(optimizer.state[parameter]["momentum_buffer"].isfinite().all())

"""A basis that neighbouring layers share: exact at full rank, counted once."""

import pytest
import torch
from torch import nn

from benchmarks.structured.shared_basis import (
    neighbours,
    shared_factors,
    shared_layers,
    shared_rank,
)
from hf_lowrank import LowRankConfig
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.modeling.targets import find_targets
from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_t5


def moment(size, seed=0, tokens=200):
    rows = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))
    rows = rows * torch.linspace(0.2, 3, size)
    return SecondMoment(rows.T @ rows, float(rows.square().sum()), size)


def layers_of(model, names):
    return {name: model.get_submodule(name) for name in names}


@pytest.mark.parametrize(
    ("build", "kind"),
    [(tiny_llama, "model.layers.{}.self_attn.k_proj"), (tiny_gpt2, "transformer.h.{}.mlp.c_fc")],
)
def test_a_basis_of_full_rank_is_exact(build, kind):
    model = build()
    layers = layers_of(model, [kind.format(0), kind.format(1)])
    factors = shared_factors(layers, [moment(32), moment(32, 1)])
    new = shared_layers(layers, factors, 32)
    inputs = torch.randn(5, 32)
    for name, layer in layers.items():
        torch.testing.assert_close(new[name](inputs), layer(inputs), rtol=1e-4, atol=1e-4)
    less = shared_layers(layers, factors, 12)
    assert all(not torch.allclose(less[n](inputs), m(inputs), atol=1e-2) for n, m in layers.items())


def test_the_basis_is_one_module():
    model = tiny_llama()
    names = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    layers = layers_of(model, names)
    rank = shared_rank((64, 32), 2, 0.6)
    new = shared_layers(layers, shared_factors(layers, [moment(32)] * 2), rank)
    assert new[names[0]][0] is new[names[1]][0]
    kept = sum(weight.numel() for weight in nn.ModuleList(new.values()).parameters())
    assert kept == rank * (32 + 2 * 64)
    assert 0.6 * 2 * 64 * 32 - (32 + 2 * 64) < kept <= 0.6 * 2 * 64 * 32


def test_the_basis_is_the_best_for_both_layers_together():
    """Stacked weights cut in the sum of both metrics, with numpy's SVD for a reference."""
    model = tiny_llama()
    layers = layers_of(model, [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)])
    moments = [moment(32), moment(32, 1)]
    total = sum(each.matrix for each in moments).double()
    total.diagonal().add_(0.01 * total.diagonal().mean())
    root = torch.linalg.cholesky(total)
    stacked = torch.cat([linear_weight(layer) for layer in layers.values()]).double()
    u, s, vh = torch.linalg.svd(stacked @ root, full_matrices=False)
    best = (u[:, :9] * s[:9]) @ vh[:9] @ torch.linalg.inv(root)
    new = shared_layers(layers, shared_factors(layers, moments), 9)
    found = torch.cat([layer[1].weight @ layer[0].weight for layer in new.values()])
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-4)


def test_layers_alike_share_a_basis_without_loss():
    model = tiny_llama()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    layers = layers_of(model, names)
    with torch.no_grad():
        planted = 0.2 * torch.randn(8, 32)
        for layer in layers.values():
            layer.weight.copy_(torch.randn(32, 8) @ planted)
    new = shared_layers(layers, shared_factors(layers, [moment(32)] * 2), 8)
    inputs = torch.randn(5, 32)
    for name, layer in layers.items():
        torch.testing.assert_close(new[name](inputs), layer(inputs), rtol=1e-3, atol=1e-3)


def test_who_shares():
    model = tiny_llama(num_hidden_layers=5)
    targets = list(find_targets(model, LowRankConfig(param_ratio=0.5)))
    groups = neighbours(targets)
    assert len(groups) == 5 * 2
    assert ["model.layers.2.mlp.gate_proj", "model.layers.3.mlp.gate_proj"] in groups
    together = {name for group in groups for name in group}
    assert not any(name.endswith(("o_proj", "down_proj")) for name in together)
    assert not any(".layers.4." in name for name in together)
    assert sorted(len(group) for group in neighbours(targets, 3)) == [2] * 5 + [3] * 5
    t5 = neighbours(list(find_targets(tiny_t5(), LowRankConfig(param_ratio=0.5))))
    assert {name.split(".")[0] for group in t5 for name in group} == {"encoder", "decoder"}
    assert all(len({name.split(".")[0] for name in group}) == 1 for group in t5)
    assert neighbours(["classifier.query"]) == []


def test_layers_of_different_shapes_are_refused():
    layers = {"h.0.up_proj": nn.Linear(32, 64), "h.1.up_proj": nn.Linear(32, 48)}
    with pytest.raises(TargetError, match=r"^h\.1\.up_proj: has shape \(48, 32\) and can't share"):
        shared_factors(layers, [moment(32)] * 2)


def test_a_size_without_any_rank_is_refused():
    with pytest.raises(ConfigError, match=r"param_ratio 0\.01 is too small for a basis that 2"):
        shared_rank((16, 32), 2, 0.01)
    assert shared_rank((16, 32), 2, 1.0) == 16

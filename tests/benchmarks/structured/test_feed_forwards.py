"""Channels of feed-forwards: what each system does to a block, alone."""

import pytest
import torch
from torch import nn

from benchmarks.structured.folding import cluster_channels, folding_narrowing, repair_scale
from benchmarks.structured.lorap import channel_importance, kept_channels
from benchmarks.structured.methods import num_kept
from benchmarks.structured.sp3 import principal_channels, principal_narrowing
from hf_lowrank import LowRankConfig
from hf_lowrank.channels.narrowing import channel_weights, narrowed, selection
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.feed_forward import find_feed_forwards
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.modeling.surgery import swapped
from hf_lowrank.modeling.targets import find_targets
from tests.tiny_models import (
    TINY_MODELS,
    batches_for,
    logits,
    tiny_llama,
    token_batches,
)

BATCH = token_batches(1)[0]
HALF = 32  # of the 64 channels of a tiny Llama
BLOCKS = {"gpt2": 2, "llama": 2, "opt": 2, "bert": 2, "t5": 4, "qwen2_moe": 2}


def blocks_of(model):
    return find_feed_forwards(model, find_targets(model, LowRankConfig(param_ratio=0.5)))


def edit_rows(model, edit):
    """Changes every feed-forward's layers into the channels, and the one out of them, in place."""
    with torch.no_grad():
        for block in blocks_of(model):
            layers = [linear_weight(model.get_submodule(name)) for name in block.names]
            edit(layers[:-1], layers[-1])


def narrow_all(model, make):
    """New layers for all blocks by a function of a block and its weights."""
    layers = {}
    for block in blocks_of(model):
        layers |= narrowed(model, block, make(block, channel_weights(model, block)))
    return layers


def difference(model, layers):
    """Largest change of the logits."""
    before = logits(model, BATCH)
    with swapped(model, layers):
        return float((logits(model, BATCH) - before).abs().max())


def whole_moments(model, batches):
    targets = find_targets(model, LowRankConfig(param_ratio=0.5))
    return collect_moments(model, targets, batches, frozenset({"input_whole"}))


@pytest.mark.parametrize("name", BLOCKS)
def test_dropping_channels_that_do_nothing_changes_nothing(name):
    model = TINY_MODELS[name]()
    batch = batches_for(model, 1)[0]
    dead = torch.arange(1, 48, 3)

    def kill(inputs, output):
        output[:, dead[dead < output.shape[1]]] = 0

    edit_rows(model, kill)
    blocks = blocks_of(model)
    assert len(blocks) == BLOCKS[name]

    def keep(block, weights):
        n = weights.output.shape[1]
        return selection(
            torch.tensor([i for i in range(n) if i not in set(dead.tolist())]), weights
        )

    layers = narrow_all(model, keep)
    before = logits(model, batch)
    with swapped(model, layers):
        torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-5)
        for block in blocks:
            widths = {tuple(linear_weight(model.get_submodule(n)).shape) for n in block.inputs}
            assert len(widths) == 1
            assert widths.pop()[0] == linear_weight(model.get_submodule(block.output)).shape[1]
    assert difference(tiny_llama(), narrow_all(tiny_llama(), keep)) > 0.1


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_models_without_known_feed_forwards_are_refused(name):
    with pytest.raises(TargetError, match=r"no feed-forward of a known kind .*gate_proj, up_proj"):
        blocks_of(TINY_MODELS[name]())


def test_new_layers_are_like_those_they_replace():
    model = tiny_llama().to(torch.bfloat16).train()
    model.requires_grad_(False)
    state = torch.get_rng_state()
    layers = narrow_all(model, lambda block, weights: selection(torch.arange(HALF), weights))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers.values())
    assert all(layer.training and not layer.weight.requires_grad for layer in layers.values())
    name = "model.layers.0.mlp.gate_proj"
    assert torch.equal(layers[name].weight, model.get_submodule(name).weight[:HALF])


def test_number_of_channels():
    assert [num_kept(10, ratio) for ratio in (1.0, 0.55, 0.3, 0.1)] == [10, 5, 3, 1]
    with pytest.raises(ConfigError, match=r"0\.05 leaves none of 10 channels; raise it to 0\.1 or"):
        num_kept(10, 0.05)


def test_whole_moments_are_of_the_inputs_themselves():
    model = tiny_llama()
    seen = []
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    moments = whole_moments(model, token_batches(2, padding=3))
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    for batch in token_batches(2, padding=3):
        logits(model, batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in token_batches(2, padding=3)]
    rows = torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)])
    found = moments["model.layers.1.mlp.down_proj"].input_whole
    torch.testing.assert_close(found.matrix, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert found.squares == pytest.approx(float(rows.square().sum()), rel=1e-5)
    parts = [moments[f"model.layers.1.self_attn.{x}_proj"].input_whole for x in "qkv"]
    assert parts[0] is parts[1] is parts[2]
    assert parts[1].matrix.shape == (32, 32)


def test_importance_by_hand():
    weights = channel_weights(tiny_llama(), blocks_of(tiny_llama())[0])
    inputs, channels = torch.rand(32).double(), torch.rand(64).double()
    gate, up = weights.inputs
    expected = [
        (gate[i] ** 2 * inputs).sum()
        + (up[i] ** 2 * inputs).sum()
        + (weights.output[:, i] ** 2).sum() * channels[i]
        for i in range(64)
    ]
    torch.testing.assert_close(
        channel_importance(weights, inputs, channels), torch.stack(expected).sqrt()
    )


def test_the_least_important_hundredth_stays():
    importance = torch.arange(200.0).flip(0)
    kept = kept_channels(importance, 100)
    assert kept.tolist() == [*range(98), 198, 199]
    assert kept_channels(importance, 1).tolist() == [0]
    assert kept_channels(importance, 200).tolist() == list(range(200))


def test_lorap_keeps_the_channels_that_matter():
    model = tiny_llama()

    def weaken(inputs, output):
        output[:, ::2] *= 0.01
        for rows in inputs:
            rows[::2] *= 0.1

    edit_rows(model, weaken)
    moments = whole_moments(model, token_batches(4))

    def prune(block, weights):
        squares = [
            moments[name].input_whole.matrix.diagonal() for name in (block.inputs[0], block.output)
        ]
        return selection(kept_channels(channel_importance(weights, *squares), HALF + 1), weights)

    def at_random(block, weights):
        return selection(torch.randperm(64, generator=generator)[: HALF + 1], weights)

    pruned = difference(model, narrow_all(model, prune))
    generator = torch.Generator().manual_seed(0)
    others = [difference(model, narrow_all(model, at_random)) for _ in range(5)]
    assert 0 < pruned < 0.05 * min(others)


def test_principal_channels_stand_for_the_others():
    """Half of the channels are multiples of others: they go, and nothing is lost."""
    model = tiny_llama()

    def repeat(inputs, output):
        gate, up = inputs
        gate[HALF:] = gate[:HALF]
        up[HALF:] = 2 * up[:HALF]

    edit_rows(model, repeat)
    moments = whole_moments(model, token_batches(12))

    def project(block, weights):
        return principal_narrowing(weights, moments[block.output].input_whole, HALF)

    def prune(block, weights):
        squares = [
            moments[name].input_whole.matrix.diagonal() for name in (block.inputs[0], block.output)
        ]
        return selection(kept_channels(channel_importance(weights, *squares), HALF), weights)

    projected = difference(model, narrow_all(model, project))
    assert projected < 0.1 * difference(model, narrow_all(model, prune))


def test_all_channels_stay_as_they_are_under_their_own_projection():
    model = tiny_llama()
    moments = whole_moments(model, token_batches(4))
    layers = narrow_all(
        model, lambda b, w: principal_narrowing(w, moments[b.output].input_whole, 64)
    )
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight, model.get_submodule(name).weight)


def test_principal_channels_of_a_diagonal_moment_are_the_largest():
    values = torch.tensor([1.0, 5.0, 3.0, 0.5, 4.0]).double()
    assert principal_channels(torch.diag(values), 3).tolist() == [1, 2, 4]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_folding_equal_channels_loses_nothing(name):
    """Equal weights in, different weights out: the columns add up."""
    model = TINY_MODELS[name]()
    half = linear_weight(model.get_submodule(blocks_of(model)[0].output)).shape[1] // 2

    def repeat(inputs, output):
        for rows in inputs:
            rows[half:] = rows[:half].flip(0)

    edit_rows(model, repeat)
    for block in blocks_of(model):
        for layer in (model.get_submodule(n) for n in block.inputs):
            if layer.bias is not None:
                with torch.no_grad():
                    layer.bias[half:] = layer.bias[:half].flip(0)
    layers = narrow_all(model, lambda block, weights: folding_narrowing(weights, half))
    assert all(min(linear_weight(layer).shape) <= half for layer in layers.values())
    assert difference(model, layers) < 1e-4
    many = narrow_all(model, lambda block, weights: folding_narrowing(weights, half + 5))
    assert difference(model, many) < 1e-4
    repaired = narrow_all(model, lambda b, weights: folding_narrowing(weights, half, repair=True))
    assert difference(model, repaired) < 1e-4
    few = narrow_all(model, lambda block, weights: folding_narrowing(weights, half - 5))
    assert difference(model, few) > 1e-2


def test_clusters_of_near_channels_are_found():
    model = tiny_llama()
    noise = torch.Generator().manual_seed(0)

    def repeat(inputs, output):
        for rows in inputs:
            rows.copy_(rows[:8].repeat(8, 1) + 1e-3 * torch.randn(rows.shape, generator=noise))

    edit_rows(model, repeat)
    labels = cluster_channels(channel_weights(model, blocks_of(model)[0]), 8)
    assert len(set(labels[:8].tolist())) == 8
    assert torch.equal(labels, labels[:8].repeat(8))


def test_repaired_rows_are_as_long_as_those_they_stand_for():
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0], [2.0, 0.0], [-2.0, 0.0]]).double()
    labels = torch.tensor([0, 0, 1, 2, 2])
    mean = nn.functional.one_hot(labels).double()
    mean = (mean / mean.sum(0)).T
    scale = repair_scale(rows, mean, labels)
    assert scale.tolist() == pytest.approx([2**0.5, 1.0, 2**0.5])
    repaired = scale[:, None] * (mean @ rows)
    assert repaired[0].square().sum() == pytest.approx((9 + 16) / 2)

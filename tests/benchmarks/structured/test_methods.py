"""The structured systems on whole models: their size, their use, and the model afterwards."""

import pytest
import torch

from benchmarks.structured.methods import METHODS, Dense
from hf_lowrank import LowRankConfig
from hf_lowrank.channels.narrowing import channel_weights, narrowed, selection
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.feed_forward import find_feed_forwards
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.modeling.surgery import swapped
from hf_lowrank.modeling.targets import find_targets
from tests.tiny_models import TINY_MODELS, batches_for, logits, tiny_llama, written_batches


def start(model, batches, name):
    targets = find_targets(model, LowRankConfig(param_ratio=0.5))
    needs = METHODS[name].needs
    return Dense(model, targets, collect_moments(model, targets, batches, needs) if needs else {})


def kept(model, names):
    weights = {
        id(p): p.numel()
        for name in names
        for p in model.get_submodule(name).parameters()
        if p.ndim == 2
    }
    return sum(weights.values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_the_size_is_met_and_the_model_restored(name, architecture):
    model = TINY_MODELS[architecture]()
    batches = batches_for(model, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = {key: id(module) for key, module in model.named_modules()}
    output = logits(model, batches[0])
    dense = start(model, batches, name)
    total = sum(m * n for m, n in map(linear_shape, dense.targets.values()))
    built = METHODS[name].build(dense, 0.5, 0)

    def use():
        with swapped(model, built.layers):
            assert 0.47 < kept(model, dense.targets) / total <= 0.5
            changed = logits(model, batches[0])
            assert torch.isfinite(changed).all()
            assert not torch.allclose(changed, output, atol=1e-2)
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        use()
    assert {key: id(module) for key, module in model.named_modules()} == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, batches[0]), output)
    assert built.decompositions > 0


@pytest.mark.parametrize("name", METHODS)
def test_feed_forwards_keep_whole_channels(name):
    model = tiny_llama()
    dense = start(model, batches_for(model, 2), name)
    layers = METHODS[name].build(dense, 0.4, 0).layers
    down = layers["model.layers.1.mlp.down_proj"]
    if name == "basis-sharing":
        shared = [layers[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1)]
        assert shared[0][0] is shared[1][0]
        assert down.rank * (32 + 64) <= 0.4 * 32 * 64
    else:
        assert down.in_features == 25 == int(0.4 * 64)
        assert layers["model.layers.1.mlp.gate_proj"].out_features == 25


@pytest.mark.parametrize("name", ["lorap", "sp3", "basis-sharing"])
def test_calibrated_systems_beat_random_channels_and_plain_factors(name):
    """On text that the model wrote itself; a part of its channels does little."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::3] *= 0.1
    text = written_batches(model, num_batches=12)
    dense = start(model, text[:8], name)

    def loss(layers):
        with swapped(model, layers):
            return measure_loss(model, text[8:]).mean

    generator = torch.Generator().manual_seed(0)
    reference = METHODS["model-folding"].build(dense, 0.6, 0).layers
    others = []
    for _ in range(3):
        layers = dict(reference)
        for block in find_feed_forwards(model, dense.targets):
            some = torch.randperm(64, generator=generator)[:38]
            layers |= narrowed(model, block, selection(some, channel_weights(model, block)))
        others.append(loss(layers))
    assert loss({}) < loss(METHODS[name].build(dense, 0.6, 0).layers) < min(others)

"""Which layers are asked for under which names, and what a rank holds of channels."""

import pytest

from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.layout import Layout
from hf_lowrank.serving.vllm.shards import ListedLayers, Stretch


def listed(*names):
    return ListedLayers(Layout(dict.fromkeys(names, 2)))


@pytest.mark.parametrize(
    ("saved", "asked"),
    [
        ("model.layers.0.q", "model.layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),
        ("model.layers.0.q", "layers.0.q"),
        ("h.0.c_attn", "transformer.h.0.c_attn"),
    ],
)
def test_a_layer_is_found_from_another_head(saved, asked):
    assert listed(saved).find(asked) == saved


@pytest.mark.parametrize("asked", ["vision.model.layers.0.q", "layers.10.q", "layers.0.q_norm"])
def test_another_layer_is_not_found(asked):
    assert listed("layers.0.q").find(asked) is None


def test_layers_inside_a_module_are_found():
    assert listed("mlp.experts.1.up").below("mlp.experts") == "mlp.experts.1.up"
    assert listed("mlp.experts.1.up").below("mlp.expert") is None


def test_a_layer_that_was_asked_for_is_claimed():
    layers = listed("q", "k")
    layers.shards(["q"], [Stretch(4, 0, 4)], Stretch(4, 0, 4), has_bias=False)
    assert layers.unclaimed == {"k"}


@pytest.mark.parametrize(("channels", "ranks"), [(48, 4), (37, 4), (4, 4), (5, 2)])
def test_channels_are_spread_without_gap_or_overlap(channels, ranks):
    parts = [Stretch(64, 16 * r, 64 // ranks) for r in range(ranks)] if ranks == 4 else None
    parts = parts or [Stretch(64, 32 * r, 32) for r in range(ranks)]
    found = [part.narrowed("up", channels) for part in parts]
    held = [each.start + i for each in found for i in range(each.length)]
    assert held == list(range(channels))
    assert max(each.length for each in found) - min(each.length for each in found) <= 1


def test_fewer_channels_than_ranks_are_refused():
    message = r"^up: its 3 channels cannot be spread over 4 ranks; lower tensor_parallel_size\.$"
    with pytest.raises(CheckpointError, match=message):
        Stretch(64, 0, 16).narrowed("up", 3)


def test_layers_of_one_input_with_other_widths_are_refused():
    layers = ListedLayers(Layout({}, {"gate": (4, 7)}))
    message = r"^up reads 8 inputs, gate 7; the checkpoint is damaged\.$"
    with pytest.raises(CheckpointError, match=message):
        layers.shards(["gate", "up"], [Stretch(4, 0, 4)] * 2, Stretch(8, 0, 8), has_bias=False)

"""What the tests of loading ask of a model or checkpoint, and damage done to one."""

import json

import pytest
from safetensors.torch import load_file, save_file

import hf_lowrank
from hf_lowrank.errors import CheckpointError
from tests.tiny_models import equal_states, token_batches

BATCH = token_batches(1)[0]
LAYER = "model.layers.0.self_attn.q_proj"
RANK = 6  # of this layer in the llama checkpoint


def same_tensors(one, other):
    return equal_states(one.state_dict(), other.state_dict())


def load_clean(auto_class, folder, **kwargs):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def edit_config(folder, edit):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_lowrank.load(folder)
    assert "\n" not in str(caught.value)

"""Models whose weights accelerate keeps elsewhere, and models that were never loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import LlamaForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import TargetError
from tests.tiny_models import equal_states, logits, tiny_llama, token_batches

CONFIG = LowRankConfig(param_ratio=0.6)
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb")
ON_META = "is on the meta device, offloaded or never loaded; load the model where its weights fit"


def loaded(folder: Path, **places: str) -> Any:
    """The tiny Llama with its parts placed by accelerate; "disk" offloads."""
    tiny_llama().save_pretrained(folder / "dense")
    device_map = dict.fromkeys((*PARTS, "lm_head"), "cpu") | places
    model = LlamaForCausalLM.from_pretrained(
        folder / "dense", device_map=device_map, offload_folder=folder / "offloaded"
    )
    return model.eval()


def test_a_model_placed_by_a_device_map_is_compressed_as_any_other(tmp_path: Path):
    one, other = loaded(tmp_path), tiny_llama()
    for model in (one, other):
        hf_lowrank.compress(model, CONFIG, token_batches(4), progress=False)
    assert equal_states(one.state_dict(), other.state_dict())


def test_what_is_offloaded_stays_dense_and_is_saved_all_the_same(tmp_path: Path):
    model = loaded(tmp_path, **{"model.layers.1": "disk"})
    report = hf_lowrank.compress(model, CONFIG, token_batches(4), progress=False)
    assert report.ranks
    assert all(name.startswith("model.layers.0.") for name in report.ranks)
    assert report.failures["model.layers.1.mlp.up_proj"] == (
        "its weight is on the meta device, offloaded or never loaded"
    )
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        model.save_pretrained(tmp_path / "small")
    again = hf_lowrank.load(tmp_path / "small")
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(again.state_dict()[up], tiny_llama().state_dict()[up])
    (batch,) = token_batches(1)
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("offload", ["device map", "cpu", "disk", "never loaded"])
@pytest.mark.parametrize("with_text", [True, False])
def test_a_model_without_a_device_is_refused_at_once(tmp_path: Path, offload: str, with_text: bool):
    if offload == "device map":
        model = loaded(tmp_path, **dict.fromkeys((*PARTS, "lm_head"), "disk"))
    elif offload == "never loaded":
        with torch.device("meta"):
            model = LlamaForCausalLM(tiny_llama().config)
    else:
        model = tiny_llama()
        if offload == "cpu":
            cpu_offload(model, execution_device="cpu")
        else:
            disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    texts = token_batches(4) if with_text else None
    config = CONFIG if with_text else CONFIG.replace(metric="plain")
    with pytest.raises(TargetError, match=rf"^model\.embed_tokens\.weight: {ON_META}"):
        hf_lowrank.compress(model, config, texts, texts, progress=False)

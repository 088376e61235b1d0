"""`check`: the same refusals as `load`, from the headers alone."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.strict import check
from tests.format import LAYER
from tests.tiny_models import TINY_MODELS, batches_for


def test_what_loads_passes(saved):
    check(saved.folder)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture_passes(name, tmp_path):
    model = TINY_MODELS[name]()
    compress(model, LowRankConfig(param_ratio=0.6), batches_for(model), progress=False)
    model.save_pretrained(tmp_path)
    check(tmp_path)


def edited(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing keys, for example model\.norm\.weight"),
        (lambda t: t.pop(f"{LAYER}.lowrank_B.weight"), rf"{LAYER} has rank \d+ .* but no factors"),
        (lambda t: t.update(extra=torch.ones(1)), "1 unexpected keys, for example extra"),
        (
            lambda t: t.update({f"{LAYER}.lowrank_s": torch.ones(1)}),
            f"1 unexpected keys, for example {LAYER}.lowrank_s",
        ),
    ],
)
def test_a_tensor_too_few_or_too_many_is_refused(broken, change, message):
    with pytest.raises(CheckpointError, match=message):
        check(edited(broken, change))

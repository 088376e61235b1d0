"""Checkpoints: four compressed ones, a copy to damage, and a dense one."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hf_lowrank import LowRankConfig, LowRankLinear, compress
from hf_lowrank.format.forms.compact import CompactLinear
from hf_lowrank.format.forms.narrowed import NarrowedLinear
from hf_lowrank.format.forms.quantized import QuantizedLinear
from hf_lowrank.format.rebuild import compressed_layers
from tests.format import LAYER, RANK
from tests.tiny_models import tiny_gpt2, tiny_llama, written_batches


class Saved(NamedTuple):
    """A compressed model, and the folder it was saved to."""

    model: Any
    folder: Path


def compressed(build=tiny_llama, **settings):
    model = build()
    config = LowRankConfig(param_ratio=0.6, **settings)
    compress(model, config, written_batches(model), progress=False)
    return model


@pytest.fixture(scope="package")
def llama(tmp_path_factory):
    model, folder = (
        compressed(tiny_llama, rank_pattern={LAYER: RANK}),
        tmp_path_factory.mktemp("llama"),
    )
    model.save_pretrained(folder)
    return Saved(model, folder)


@pytest.fixture(scope="package")
def gpt2(tmp_path_factory):
    model, folder = compressed(tiny_gpt2), tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return Saved(model, folder)


@pytest.fixture(scope="package")
def narrowed(tmp_path_factory):
    """With feed-forwards that lost channels."""
    model, folder = compressed(channels=True), tmp_path_factory.mktemp("narrowed")
    model.save_pretrained(folder)
    return Saved(model, folder)


@pytest.fixture(scope="package")
def narrowed_gpt2(tmp_path_factory):
    model, folder = compressed(tiny_gpt2, channels=True), tmp_path_factory.mktemp("narrowed_gpt2")
    model.save_pretrained(folder)
    return Saved(model, folder)


def quantized(build, weights, form, folder):
    """With low-rank, narrowed and dense layers in int8 or int4."""
    pytest.importorskip("torchao.quantization")
    name = LAYER if build is tiny_llama else "transformer.h.0.attn.c_attn"
    settings = {"channels": True, "weights": weights, "form": form, "rank_pattern": {name: None}}
    model = compressed(build, **settings)
    kinds = {type(layer) for layer in compressed_layers(model).values()}
    lowrank = CompactLinear if form == "compact" else LowRankLinear
    assert kinds == {lowrank, NarrowedLinear, QuantizedLinear}
    model.save_pretrained(folder)
    return Saved(model, folder)


@pytest.fixture(scope="package")
def compact_gpt2(tmp_path_factory):
    model, folder = compressed(tiny_gpt2, form="compact"), tmp_path_factory.mktemp("compact_gpt2")
    model.save_pretrained(folder)
    return Saved(model, folder)


@pytest.fixture(scope="package")
def int8(tmp_path_factory):
    return quantized(tiny_gpt2, "int8", "compact", tmp_path_factory.mktemp("int8"))


@pytest.fixture(scope="package")
def int4(tmp_path_factory):
    return quantized(tiny_llama, "int4", "factors", tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="package")
def int4_gpt2(tmp_path_factory):
    return quantized(tiny_gpt2, "int4", "compact", tmp_path_factory.mktemp("int4_gpt2"))


@pytest.fixture(
    params=[
        *("llama", "gpt2", "narrowed", "narrowed_gpt2", "compact_gpt2"),
        *("int8", "int4", "int4_gpt2"),
    ]
)
def saved(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def broken(llama, tmp_path):
    """A copy of a good checkpoint, for a test to damage."""
    return Path(shutil.copytree(llama.folder, tmp_path / "broken"))


@pytest.fixture
def broken_narrowed(narrowed, tmp_path):
    """The same of one with narrowed layers."""
    return Path(shutil.copytree(narrowed.folder, tmp_path / "broken"))


@pytest.fixture(scope="package")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    return folder

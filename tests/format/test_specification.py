"""docs/format.md: the reader in it gives the weights that the library gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_lowrank import LowRankConfig, LowRankLinear
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.forms.stored_form import form_names
from hf_lowrank.format.layout import FORMAT_VERSION, Layout
from hf_lowrank.format.rebuild import compressed_layers, replace_with_lowrank_
from hf_lowrank.format.torchao_weights import NUMBERS, SCALE
from hf_lowrank.modeling.marks import attach_config_
from tests.format import LAYER, edit_config
from tests.scripts import ROOT
from tests.test_docs import python_blocks, run_blocks
from tests.tiny_models import tiny_gpt2, tiny_llama

PAGE = (ROOT / "docs" / "format.md").read_text("utf-8")


@pytest.fixture(scope="module")
def reader():
    """The functions of the page's code."""
    return run_blocks(python_blocks(PAGE), "format.md")


def check(reader, folder, model):
    """Weights and biases as read by the page, against those of the layers."""
    found = reader["dense_weights"](Path(folder))
    layers = compressed_layers(model)
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        weight, bias = found[name]
        is_factorized = isinstance(layer, LowRankLinear)
        expected = layer.dense_weight() if is_factorized else linear_weight(layer)
        np.testing.assert_allclose(weight, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
        assert (bias is None) == (layer.bias is None)
        if bias is not None:
            np.testing.assert_array_equal(bias, layer.bias.detach().numpy())


def test_the_page_s_reader_gives_the_dense_weights(reader, saved):
    assert compressed_layers(saved.model)
    check(reader, saved.folder, saved.model)


def test_the_page_s_reader_reads_shards(reader, saved, tmp_path):
    saved.model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(reader, tmp_path, saved.model)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_page_s_reader_reads_the_training_form(reader, build, tmp_path):
    model = build()
    name = LAYER if build is tiny_llama else "transformer.h.0.attn.c_attn"
    replace_with_lowrank_(model, Layout({name: 3}, form="usv"))
    torch.nn.init.normal_(model.get_submodule(name).lowrank_s)
    attach_config_(model, LowRankConfig(ranks={name: 3}, form="usv"))
    model.save_pretrained(tmp_path)
    check(reader, tmp_path, model)


def test_missing_channels_stand_behind_the_others_as_zeros(narrowed_gpt2):
    layers = compressed_layers(narrowed_gpt2.model)
    name = next(name for name in layers if name.endswith("c_fc") and name in layers)
    layer = layers[name]
    dense = layer.to_dense()
    channels = layer.weight.shape[0]
    assert channels < dense.weight.shape[1]
    assert torch.equal(dense.weight[:, :channels].T, layer.weight)
    assert not dense.weight[:, channels:].any()


def test_the_page_s_reader_refuses_what_the_page_says(reader, broken):
    edit_config(broken, lambda config: config["quantization_config"].update(form="new"))
    with pytest.raises(ValueError, match="unknown stored form 'new'"):
        reader["dense_weights"](broken)


def test_the_page_names_every_form_and_field_that_is_read(saved):
    rows = [line.split("|")[1].strip(" `") for line in PAGE.splitlines() if line.startswith("| `")]
    assert {*form_names(), *form_names("narrowed"), NUMBERS, SCALE} <= {
        row.removeprefix("M.") for row in rows
    }
    needed = {"quant_method", "format_version", "ranks", "form", "narrowed", "quantized"}
    needed.add("experts")
    assert needed <= set(rows)
    assert f"Version {FORMAT_VERSION}." in PAGE
    settings = json.loads((saved.folder / "config.json").read_text())["quantization_config"]
    only = {name: value for name, value in settings.items() if name in needed}
    assert Layout.from_settings(only) == Layout.from_settings(settings)

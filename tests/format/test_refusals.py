"""Refusals of the strict load, each in one line that says what is wrong."""

import json
import struct

import pytest
import torch

from tests.format import LAYER, edit_config, edit_tensors, refused
from tests.tiny_models import VOCABULARY


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nothing", "nothing: no such folder")


@pytest.mark.parametrize("name", ["someone/something", "no such folder", "missing"])
def test_a_name_that_is_neither_folder_nor_reachable_is_refused(name):
    refused(name, f"{name}: neither a folder nor reachable on the Hub")


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, r"has no config\.json")


def test_a_dense_checkpoint_is_refused(dense_folder):
    refused(dense_folder, "not a checkpoint of hf_lowrank")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", r"no readable config\.json"),
        ("", r"no readable config\.json"),
        ("[1, 2]", "not a checkpoint of hf_lowrank"),
        ('{"quantization_config": 3}', "not a checkpoint of hf_lowrank"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "not a checkpoint of hf_lowrank"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(broken, text, message):
    (broken / "config.json").write_text(text)
    refused(broken, message)


def test_a_config_that_is_no_text_is_refused(broken):
    (broken / "config.json").write_bytes(b"\xff\xfe\x00\x81")
    refused(broken, r"no readable config\.json")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("format_version", 4, "format_version 4, this hf_lowrank reads 1, 2, 3; update"),
        ("format_version", None, "format_version None"),
        ("colour", "red", "unknown low-rank settings colour; it was written by another version"),
        (
            "form",
            "svd",
            "bad quantization_config: form must be one of compact, factors, usv; got 'svd'",
        ),
        ("ranks", None, "holds no ranks; the checkpoint is incomplete"),
        ("ranks", ["a"], "bad quantization_config"),
        ("ranks", {LAYER: "4"}, r"ranks\['model.*q_proj'\] must be an integer >= 1, got '4'"),
        ("ranks", {LAYER: 0}, r"ranks\['model.*q_proj'\] must be an integer >= 1, got 0"),
    ],
)
def test_bad_low_rank_settings_are_refused(broken, setting, value, message):
    edit_config(broken, lambda config: config["quantization_config"].update({setting: value}))
    refused(broken, message)


def test_a_rank_that_does_not_fit_its_factors_is_refused(broken):
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].update({LAYER: 7}))
    shapes = r"\[6, 32\] and \[32, 6\]; it asks for \[7, 32\] and \[32, 7\]"
    refused(broken, rf"q_proj has rank 7 in config\.json but factors of shape {shapes}")


def test_a_rank_of_a_layer_that_the_model_lacks_is_refused(broken):
    ranks = {"model.layers.5.self_attn.q_proj": 3}
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].update(ranks))
    refused(broken, r"layers\.5\.self_attn\.q_proj a rank, but LlamaForCausalLM has no such layer")


def test_factors_of_a_layer_that_should_be_dense_are_refused(broken):
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].update({LAYER: None}))
    refused(broken, r"q_proj is dense in config\.json but has factors")


def test_factors_of_a_layer_without_a_rank_are_refused(broken):
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].pop(LAYER))
    refused(broken, r"1 missing keys, for example model.*q_proj\.weight")


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {UP: [3, 32]},
            r"up_proj has shape \[3, 32\] in config\.json but weight of shape \[\d+, 32\]",
        ),
        ({"model.layers.5.mlp.up_proj": [3, 32]}, r"up_proj a shape, but \w+ has no such layer"),
        ({UP: "small"}, r"narrowed\['model.*up_proj'\] must be \[out_features, in_features\]"),
        ({LAYER: [3, 32]}, r"q_proj has both a rank and a narrowed shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(broken_narrowed, changes, message):
    def edit(config):
        config["quantization_config"]["ranks"][LAYER] = 3
        config["quantization_config"]["narrowed"].update(changes)

    if LAYER not in changes:
        edit_config(broken_narrowed, lambda c: c["quantization_config"]["narrowed"].update(changes))
    else:
        edit_config(broken_narrowed, edit)
    refused(broken_narrowed, message)


def test_a_narrowed_layer_wider_than_the_dense_one_is_refused(broken_narrowed):
    wide = 65  # of 64 channels

    def widen(tensors):
        for name, shape in ((UP, (wide, 32)), (DOWN, (32, wide))):
            tensors[f"{name}.weight"] = torch.zeros(shape)

    def edit(config):
        config["quantization_config"]["narrowed"] |= {UP: [wide, 32], DOWN: [32, wide]}

    edit_tensors(broken_narrowed, widen)
    edit_config(broken_narrowed, edit)
    refused(
        broken_narrowed,
        r"down_proj: shape \(32, 65\) is not within that of the dense layer, \(32, 64\)",
    )


def test_a_narrowed_layer_that_config_json_does_not_know_is_refused(broken_narrowed):
    edit_config(broken_narrowed, lambda c: c["quantization_config"]["narrowed"].pop(UP))
    refused(broken_narrowed, r"narrows model.*_proj to \[.*\], which does not fit the other layers")


def test_layers_of_a_feed_forward_that_do_not_fit_each_other_are_refused(broken_narrowed):
    def cut(tensors):
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][1:].clone()

    def edit(config):
        config["quantization_config"]["narrowed"][UP][0] -= 1

    edit_tensors(broken_narrowed, cut)
    edit_config(broken_narrowed, edit)
    refused(broken_narrowed, r"narrows model.*_proj to \[.*\], which does not fit the other layers")


def test_a_width_that_merging_could_not_hold_is_refused(broken_narrowed):
    edit_config(broken_narrowed, lambda config: config.update(intermediate_size=2**40))
    refused(broken_narrowed, r"narrowed layers once had [\d,]+ weights, the tensors hold")


def test_a_missing_tensor_is_refused(broken):
    edit_tensors(broken, lambda tensors: tensors.pop("model.norm.weight"))
    refused(broken, r"1 missing keys, for example model\.norm\.weight")


def test_a_missing_factor_is_refused(broken):
    edit_tensors(broken, lambda tensors: tensors.pop(f"{LAYER}.lowrank_B.weight"))
    refused(broken, r"q_proj has rank 6 in config\.json but no factors")


def test_a_left_over_tensor_is_refused(broken):
    edit_tensors(broken, lambda tensors: tensors.update(extra=torch.zeros(2)))
    refused(broken, "1 unexpected keys, for example extra")


def test_factors_of_the_wrong_width_are_refused(broken):
    def widen(tensors):
        name = f"{LAYER}.lowrank_A.weight"
        tensors[name] = torch.zeros(tensors[name].shape[0], 40)

    edit_tensors(broken, widen)
    refused(broken, "q_proj")


@pytest.mark.parametrize(
    "architectures", [None, [], ["NoSuchModel"], "LlamaForCausalLM", [None], {"a": 1}]
)
def test_missing_or_unknown_architectures_are_refused(broken, architectures):
    edit_config(broken, lambda config: config.update(architectures=architectures))
    refused(broken, "broken: transformers [0-9.]+ has no class")


def test_an_architecture_that_is_no_model_is_refused(broken):
    edit_config(broken, lambda config: config.update(architectures=["pipeline"]))
    refused(broken, "broken: .*pipeline")


def test_missing_weights_are_refused(broken):
    (broken / "model.safetensors").unlink()
    refused(broken, r"has no model\.safetensors")


@pytest.mark.parametrize("size", [0, 4, 8, 100, 2000, -1])
def test_truncated_weights_are_refused(broken, size):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(broken, r"model\.safetensors: not a readable safetensors file")


@pytest.mark.parametrize(
    "content", [b"\x00" * 4000, b"\xff" * 4000, struct.pack("<Q", 2) + b"[]", b"PK\x03\x04" * 99]
)
def test_other_files_in_place_of_the_weights_are_refused(broken, content):
    (broken / "model.safetensors").write_bytes(content)
    refused(broken, r"model\.safetensors: not a readable safetensors file")


def rewrite_header(path, edit):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [{"dtype": "F99"}, {"data_offsets": [0, 3]}, {"shape": [1, 1]}, {"shape": "wide"}],
    ids=str,
)
def test_a_damaged_tensor_header_is_refused(broken, change):
    path = broken / "model.safetensors"
    rewrite_header(path, lambda header: header["model.norm.weight"].update(change))
    refused(broken, r"broken.*( header|model\.norm\.weight has shape)")


def sharded(llama, folder):
    llama.model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_shard_is_refused(llama, tmp_path):
    shard = sharded(llama, tmp_path)[1]
    shard.unlink()
    refused(tmp_path, f"has no {shard.name}")


def test_a_truncated_shard_is_refused(llama, tmp_path):
    shard = sharded(llama, tmp_path)[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(tmp_path, f"{shard.name}: not a readable safetensors file .*file not fully covered")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_shard_index_is_refused(llama, tmp_path, text):
    sharded(llama, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, r"model\.safetensors")


def test_a_vocabulary_that_does_not_fit_is_refused(broken):
    edit_config(broken, lambda config: config.update(vocab_size=VOCABULARY + 8))
    refused(broken, "embed_tokens|lm_head")

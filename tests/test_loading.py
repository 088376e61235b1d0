"""Compressed models are transformers models: they load, save, generate, train, cast and merge."""

import copy
import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankLinear, compress, merge
from hf_lowrank.errors import CheckpointError, ConfigError, TargetError
from hf_lowrank.loading import attach_config
from hf_lowrank.modeling_lowrank import replace_with_lowrank
from tiny_models import (
    VOCABULARY,
    logits,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    token_batches,
    written_batches,
)

BATCH = token_batches(1)[0]
LAYER = "model.layers.0.self_attn.q_proj"
RANK = 6  # of this layer in the llama checkpoint


class Saved(NamedTuple):
    """A compressed model, and the folder it was saved to."""

    model: Any
    folder: Path


def compressed(build=tiny_llama, **settings):
    model = build()
    config = LowRankConfig(param_ratio=0.6, **settings)
    compress(model, config, written_batches(model), progress=False)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model, folder = (
        compressed(tiny_llama, rank_pattern={LAYER: RANK}),
        tmp_path_factory.mktemp("llama"),
    )
    model.save_pretrained(folder)
    return Saved(model, folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    model, folder = compressed(tiny_gpt2), tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return Saved(model, folder)


@pytest.fixture(params=["llama", "gpt2"])
def saved(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def broken(llama, tmp_path):
    """A copy of a good checkpoint, for a test to damage."""
    return Path(shutil.copytree(llama.folder, tmp_path / "broken"))


def same_tensors(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype and torch.equal(tensor, right[name])
        for name, tensor in left.items()
    )


def load_clean(auto_class, folder, **kwargs):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def num_lowrank(model):
    return sum(isinstance(module, LowRankLinear) for module in model.modules())


# Loading


def test_auto_class_gives_the_native_class_and_equal_logits(saved):
    model = load_clean(AutoModelForCausalLM, saved.folder)
    assert type(model) is type(saved.model)
    assert type(model) in (LlamaForCausalLM, GPT2LMHeadModel)
    assert num_lowrank(model) == num_lowrank(saved.model) > 0
    assert not model.training
    assert torch.equal(logits(model, BATCH), logits(saved.model, BATCH))


def test_checkpoint_holds_fewer_bytes_than_the_dense_one(llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    sizes = [(f / "model.safetensors").stat().st_size for f in (llama.folder, tmp_path)]
    assert sizes[0] < 0.8 * sizes[1]


def test_strict_load_gives_the_same_model(saved):
    model = hf_lowrank.load(saved.folder)
    assert type(model) is type(saved.model)
    assert torch.equal(logits(model, BATCH), logits(saved.model, BATCH))
    assert torch.equal(logits(hf_lowrank.load(str(saved.folder)), BATCH), logits(model, BATCH))


def test_device_map_auto(saved):
    model = load_clean(AutoModelForCausalLM, saved.folder, device_map="auto")
    assert torch.equal(logits(model, BATCH), logits(saved.model, BATCH))


def test_loading_in_bfloat16_equals_casting(gpt2):
    model = load_clean(AutoModelForCausalLM, gpt2.folder, dtype=torch.bfloat16)
    cast = copy.deepcopy(gpt2.model).to(torch.bfloat16)
    assert same_tensors(model, cast)
    assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    assert torch.equal(logits(model, BATCH), logits(cast, BATCH))


def test_strict_load_passes_keywords_on(llama):
    assert hf_lowrank.load(llama.folder, dtype=torch.float16).dtype == torch.float16


def test_sharded_checkpoint(saved, tmp_path):
    saved.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(
        logits(load_clean(AutoModelForCausalLM, tmp_path), BATCH), logits(saved.model, BATCH)
    )
    assert same_tensors(hf_lowrank.load(tmp_path), saved.model)


def test_a_second_save_writes_the_same_checkpoint(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved.folder).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in saved.folder.iterdir()}
    first, second = (json.loads((f / "config.json").read_text()) for f in (saved.folder, tmp_path))
    assert first["quantization_config"] == second["quantization_config"]
    assert first["auto_map"] == second["auto_map"]
    assert same_tensors(hf_lowrank.load(tmp_path), saved.model)


def test_saving_over_the_folder_that_it_was_loaded_from(broken, llama):
    model = hf_lowrank.load(broken)
    model.save_pretrained(broken)
    assert same_tensors(hf_lowrank.load(broken), llama.model)


def test_base_class_loads_a_checkpoint_with_a_head(saved):
    model = load_clean(AutoModel, saved.folder)
    assert type(model) is type(saved.model.base_model)
    with torch.no_grad():
        expected = saved.model.base_model(**BATCH).last_hidden_state
        assert torch.equal(model(**BATCH).last_hidden_state, expected)


def test_head_class_loads_what_the_base_class_saved(saved, tmp_path):
    AutoModel.from_pretrained(saved.folder).save_pretrained(tmp_path)
    model = load_clean(AutoModelForCausalLM, tmp_path)
    assert torch.equal(logits(model, BATCH), logits(saved.model, BATCH))


def test_strict_load_accepts_what_the_base_class_saved(llama, tmp_path):
    AutoModel.from_pretrained(llama.folder).save_pretrained(tmp_path)
    model = hf_lowrank.load(tmp_path)
    assert type(model) is LlamaModel
    assert num_lowrank(model) == num_lowrank(llama.model)


def test_another_head_on_the_same_body(llama, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(llama.folder, num_labels=3)
    assert num_lowrank(model) == num_lowrank(llama.model)
    model.save_pretrained(tmp_path)
    again = hf_lowrank.load(tmp_path)
    assert torch.equal(again.score.weight, model.score.weight)


def test_training_form_survives_saving(tmp_path):
    model, ranks = tiny_llama(), {LAYER: RANK, "model.layers.1.mlp.up_proj": 4}
    replace_with_lowrank(model, ranks, "usv")
    torch.nn.init.normal_(model.get_submodule(LAYER).lowrank_s)
    attach_config(model, LowRankConfig(ranks=ranks, form="usv"))
    model.save_pretrained(tmp_path)
    again = hf_lowrank.load(tmp_path)
    assert again.get_submodule(LAYER).form == "usv"
    assert same_tensors(again, model)


@pytest.mark.parametrize("form", ["factors", "usv"])
def test_a_checkpoint_loads_whatever_form_was_asked_for(form, tmp_path):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.6, metric="plain", form=form)
    compress(model, config, progress=False)
    model.save_pretrained(tmp_path)
    assert same_tensors(hf_lowrank.load(tmp_path), model)


# Using a loaded model


def test_generation_is_the_same_after_loading(saved):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = saved.model.generate(**BATCH, **options)
    assert expected.shape == (2, 16 + 12)
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    assert torch.equal(model.generate(**BATCH, **options), expected)


def test_compiled_model_agrees(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.folder)
    found = logits(torch.compile(model, backend="eager"), BATCH)
    torch.testing.assert_close(found, logits(saved.model, BATCH), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_a_loaded_model(llama, dtype):
    model = AutoModelForCausalLM.from_pretrained(llama.folder).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(
        logits(model, BATCH).float(), logits(llama.model, BATCH), rtol=0.2, atol=0.2
    )


def test_half_and_float(llama):
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32


def test_half_precision_is_saved_and_loaded(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama.folder).half()
    model.save_pretrained(tmp_path)
    again = hf_lowrank.load(tmp_path)
    assert again.dtype == torch.float16
    assert same_tensors(again, model)


def test_a_deep_copy_is_independent_and_saves_itself(llama, tmp_path):
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.get_submodule(LAYER).lowrank_A.weight.zero_()
    model.save_pretrained(tmp_path)
    assert same_tensors(hf_lowrank.load(tmp_path), model)
    assert llama.model.get_submodule(LAYER).lowrank_A.weight.abs().sum() > 0


def test_a_compressed_model_can_be_pickled(llama):
    assert same_tensors(pickle.loads(pickle.dumps(llama.model)), llama.model)


def trainer(model, folder, steps, data):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    return Trainer(model=model, args=arguments, train_dataset=data)


def test_trainer_trains_saves_and_resumes(llama, tmp_path):
    tokens = token_batches(1, batch_size=16, length=12)[0]["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in tokens]
    whole = AutoModelForCausalLM.from_pretrained(llama.folder)
    trainer(whole, tmp_path / "whole", 4, data).train()

    first = AutoModelForCausalLM.from_pretrained(llama.folder)
    trainer(first, tmp_path / "parts", 2, data).train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert same_tensors(hf_lowrank.load(checkpoint), first)
    before, after = llama.model.get_submodule(LAYER), first.get_submodule(LAYER)
    assert not torch.equal(before.lowrank_A.weight, after.lowrank_A.weight)
    assert not torch.equal(before.lowrank_B.weight, after.lowrank_B.weight)

    resumed = AutoModelForCausalLM.from_pretrained(llama.folder)
    trainer(resumed, tmp_path / "parts", 4, data).train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)


# Back to dense


@pytest.mark.parametrize("undo", [merge, lambda model: model.dequantize()])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_merged_model_saves_as_a_plain_dense_checkpoint(saved, loaded, undo, tmp_path):
    model = copy.deepcopy(saved.model)
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(saved.folder)
    undo(model)
    assert num_lowrank(model) == 0
    torch.testing.assert_close(
        logits(model, BATCH), logits(saved.model, BATCH), rtol=1e-3, atol=1e-3
    )
    model.save_pretrained(tmp_path / "merged")
    dense = tiny_gpt2() if type(model) is GPT2LMHeadModel else tiny_llama()
    dense.save_pretrained(tmp_path / "dense")
    merged = {path.name for path in (tmp_path / "merged").iterdir()}
    assert merged == {path.name for path in (tmp_path / "dense").iterdir()}
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("merged", "dense")]
    assert configs[0] == configs[1]
    shapes = [
        {n: t.shape for n, t in load_file(tmp_path / f / "model.safetensors").items()}
        for f in ("merged", "dense")
    ]
    assert shapes[0] == shapes[1]
    again = load_clean(AutoModelForCausalLM, tmp_path / "merged")
    assert torch.equal(logits(again, BATCH), logits(model, BATCH))


def test_a_merged_gpt2_has_conv1d_layers_again(gpt2):
    model = merge(AutoModelForCausalLM.from_pretrained(gpt2.folder))
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is Conv1D
    assert layer.weight.shape == (32, 96)
    assert torch.equal(layer.bias, tiny_gpt2().transformer.h[0].attn.c_attn.bias)


# Compressing a dense checkpoint while it is loaded


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("goal", [{"param_ratio": 0.8}, {"rank": 5}])
def test_compressing_while_loading_equals_compress(dense_folder, goal, tmp_path):
    config = LowRankConfig(metric="plain", **goal)
    model = load_clean(AutoModelForCausalLM, dense_folder, quantization_config=config)
    expected = tiny_llama()
    report = compress(expected, config, progress=False)
    assert num_lowrank(model) > 0
    assert same_tensors(model, expected)
    assert model.config.quantization_config.ranks == report.ranks
    model.save_pretrained(tmp_path)
    assert same_tensors(hf_lowrank.load(tmp_path), model)


def test_compressing_while_loading_in_training_form_saves_what_loads(dense_folder, tmp_path):
    config = LowRankConfig(rank=5, metric="plain", form="usv")
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    assert same_tensors(hf_lowrank.load(tmp_path), model)


@pytest.mark.parametrize("metric", ["plain", "sparsity"])  # those that need no data
def test_compressing_while_loading_respects_the_budget(dense_folder, metric):
    names = [n for n, m in tiny_llama().model.layers.named_modules() if isinstance(m, nn.Linear)]
    dense = sum(tiny_llama().model.layers.get_submodule(n).weight.numel() for n in names)
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, quantization_config=LowRankConfig(param_ratio=0.8, metric=metric)
    )
    layers = model.model.layers
    kept = sum(p.numel() for n in names for p in layers.get_submodule(n).parameters())
    assert 0.75 * dense < kept <= 0.8 * dense


def test_compressing_while_loading_with_other_keywords(dense_folder):
    config = LowRankConfig(param_ratio=0.8, metric="plain")
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, quantization_config=config, dtype=torch.bfloat16, device_map="auto"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert num_lowrank(model) > 0


def test_compressing_while_loading_keeps_the_classification_head(tmp_path):
    dense = tiny_bert_classifier()
    dense.save_pretrained(tmp_path)
    config = LowRankConfig(param_ratio=0.8, metric="plain")
    model = load_clean(AutoModelForSequenceClassification, tmp_path, quantization_config=config)
    assert num_lowrank(model) == 12
    assert torch.equal(model.classifier.weight, dense.classifier.weight)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"param_ratio": 0.8}, ConfigError, "no calibration data, which metric 'kfac' needs"),
        ({"rank": 4, "metric": "whitened"}, ConfigError, "which metric 'whitened' needs"),
        ({"metric": "plain"}, ConfigError, "can't measure a loss; give .* a param_ratio or a rank"),
        ({"metric": "plain", "loss_tolerance": 0.1}, ConfigError, "can't measure a loss"),
        ({"metric": "plain", "rank": 20}, ConfigError, r"k_proj: rank 20 exceeds min\(16, 32\)"),
        (
            {"metric": "plain", "rank": 4, "target_modules": ["c_attn"]},
            TargetError,
            "target_modules: 'c_attn' matches no linear layer",
        ),
    ],
)
def test_compressing_while_loading_refuses_what_it_cannot_do(
    dense_folder, settings, error, message
):
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(
            dense_folder, quantization_config=LowRankConfig(**settings)
        )


def test_a_compressed_checkpoint_is_not_compressed_again_while_loading(llama):
    config = LowRankConfig(param_ratio=0.3, metric="plain")
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=config)
    assert same_tensors(model, llama.model)


# Refusals of the strict load


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
        ("format_version", 2, "format_version 2, this hf_lowrank reads 1; update"),
        ("format_version", None, "format_version None"),
        ("colour", "red", "unknown low-rank settings colour; it was written by another version"),
        ("form", "svd", "bad quantization_config: form must be one of factors, usv; got 'svd'"),
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
    shapes = r"shapes \[6, 32\] and \[32, 6\]"
    refused(broken, rf"q_proj has rank 7 in config\.json, but its factors have {shapes}")


def test_a_rank_without_factors_is_refused(broken):
    ranks = {"model.layers.5.self_attn.q_proj": 3}
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].update(ranks))
    refused(broken, r"layers\.5\.self_attn\.q_proj has rank 3 in config\.json but no factors")


def test_factors_of_a_layer_that_should_be_dense_are_refused(broken):
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].update({LAYER: None}))
    refused(broken, r"q_proj is dense in config\.json but has factors")


def test_factors_of_a_layer_without_a_rank_are_refused(broken):
    edit_config(broken, lambda c: c["quantization_config"]["ranks"].pop(LAYER))
    refused(broken, r"1 missing keys, for example model.*q_proj\.weight")


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
    refused(tmp_path, f"{shard.name}: not a readable safetensors file: its size does not fit")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_shard_index_is_refused(llama, tmp_path, text):
    sharded(llama, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, r"model\.safetensors")


def test_a_vocabulary_that_does_not_fit_is_refused(broken):
    edit_config(broken, lambda config: config.update(vocab_size=VOCABULARY + 8))
    refused(broken, "embed_tokens|lm_head")

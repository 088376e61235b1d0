"""Compressed models are transformers models: what was saved loads again, by any class."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
)

import hf_lowrank
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.format.layout import Layout
from hf_lowrank.format.rebuild import replace_with_lowrank_
from hf_lowrank.modeling.marks import attach_config_
from tests.format import BATCH, LAYER, RANK, edit_config, load_clean, same_tensors
from tests.tiny_models import logits, num_lowrank, tiny_llama

pytestmark = pytest.mark.oldest


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
    saved.model.save_pretrained(tmp_path, max_shard_size="6KB")
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
    replace_with_lowrank_(model, Layout(ranks, form="usv"))
    torch.nn.init.normal_(model.get_submodule(LAYER).lowrank_s)
    attach_config_(model, LowRankConfig(ranks=ranks, form="usv"))
    model.save_pretrained(tmp_path)
    again = hf_lowrank.load(tmp_path)
    assert again.get_submodule(LAYER).form == "usv"
    assert same_tensors(again, model)


@pytest.mark.parametrize("form", ["factors", "compact"])
def test_a_checkpoint_loads_whatever_form_was_asked_for(form, tmp_path):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.6, metric="plain", form=form)
    compress(model, config, progress=False)
    model.save_pretrained(tmp_path)
    assert same_tensors(hf_lowrank.load(tmp_path), model)


def test_a_model_built_from_the_same_config_object_stays_dense(tmp_path):
    student = tiny_llama()
    teacher = type(student)(student.config)
    config = student.config
    compress(student, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    assert teacher.config is config
    assert not {"quantization_config", "auto_map"} & vars(config).keys()
    teacher.save_pretrained(tmp_path / "teacher")
    again = load_clean(AutoModelForCausalLM, tmp_path / "teacher")
    assert num_lowrank(again) == 0
    assert same_tensors(again, teacher)
    own = student.config
    assert own is student.model.config is student.model.layers[0].self_attn.config
    student.save_pretrained(tmp_path / "student")
    assert same_tensors(hf_lowrank.load(tmp_path / "student"), student)


def test_a_checkpoint_of_version_1_loads_as_two_factors(llama, tmp_path):
    folder = Path(shutil.copytree(llama.folder, tmp_path / "old"))

    def age(config):
        settings = config["quantization_config"]
        settings["format_version"] = 1
        del settings["form"]

    edit_config(folder, age)
    for loaded in (hf_lowrank.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert same_tensors(loaded, llama.model)
        assert loaded.config.quantization_config.inference_form == "factors"
    loaded.save_pretrained(tmp_path / "again")
    assert same_tensors(hf_lowrank.load(tmp_path / "again"), llama.model)

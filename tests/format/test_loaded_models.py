"""A loaded model generates, trains, casts, copies and merges like any other."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import hf_lowrank
from hf_lowrank import merge
from tests.format import BATCH, LAYER, load_clean, same_tensors
from tests.tiny_models import logits, num_lowrank, tiny_gpt2, tiny_llama, token_batches

pytestmark = pytest.mark.oldest

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

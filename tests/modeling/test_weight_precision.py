"""Which matrices are quantized, in which blocks."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_lowrank import LowRankConfig, compress, compress_jointly, get_lowrank_model, sweep
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.forms.quantized import QuantizedLinear
from hf_lowrank.format.layout import Precision
from hf_lowrank.format.torchao_weights import precision_of, quantized_modules
from hf_lowrank.modeling.weight_precision import block_of, nearest_divisor
from hf_lowrank.training.trainer import LowRankTrainer
from hf_lowrank.training.training_arguments import LowRankTrainingArguments
from tests.tiny_models import batches_for, logits, tiny_gpt2, tiny_llama

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
PLAIN = LowRankConfig(param_ratio=0.6, metric="plain")


@pytest.mark.parametrize(
    ("size", "expected"), [(576, 32), (1, 1), (20, 20), (100, 25), (97, 97), (98, 49), (509, 509)]
)
def test_the_divisor_nearest_to_32(size, expected):
    assert nearest_divisor(size) == expected


def test_blocks_go_along_the_side_that_has_the_better_divisor():
    assert block_of((576, 97), 4) == (32, 1)
    assert block_of((97, 576), 4) == (1, 32)
    assert block_of((576, 192), 4) == (1, 32)
    assert block_of((576, 97), 8) == (1, 97)
    assert block_of((576, 1), 8) == (576, 1)


@needs_torchao
@pytest.mark.parametrize("form", ["factors", "compact"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_every_target_is_quantized_and_nothing_else(weights, form):
    model = tiny_gpt2()
    ranks = {"transformer.h.0.attn.c_attn": 5, "transformer.h.0.mlp.c_fc": None}
    settings = {"ranks": ranks, "target_modules": list(ranks), "metric": "plain"}
    compress(model, LowRankConfig(**settings, weights=weights, form=form), progress=False)
    modules = quantized_modules(model)
    first = "transformer.h.0.attn.c_attn.lowrank_"
    assert modules.keys() == {f"{first}A", f"{first}B", "transformer.h.0.mlp.c_fc"}
    assert type(modules["transformer.h.0.mlp.c_fc"]) is QuantizedLinear
    found = {name: precision_of(module.weight) for name, module in modules.items()}
    bits = 8 if weights == "int8" else 4
    # A compact layer of more outputs than inputs keeps 32 - 5 of them in A.
    first_bits, width = (8, 27) if form == "compact" else (bits, 32)
    assert found == {
        f"{first}A": Precision(first_bits, (1, width)),
        f"{first}B": Precision(8, (1, 5)),
        "transformer.h.0.mlp.c_fc": Precision(bits, (1, 32)),
    }


@needs_torchao
def test_the_report_says_what_is_stored(text):
    model, other = tiny_llama(), tiny_llama()
    config = LowRankConfig(param_ratio=0.6, weights="int4", rank_pattern={"layers.0.*": None})
    report = compress(model, config, text[:4], text[4:6], progress=False)
    found = report.quantization
    assert (found.weights, found.matrices) == ("int4", len(quantized_modules(model)))
    precisions = model.config.quantization_config.quantized.values()
    assert sum(found.groups.values()) == sum(each["bits"] == 4 for each in precisions)
    assert 0 < found.groups["32"] < found.matrices
    plain = compress(other, config.replace(weights=None), text[:4], text[4:6], progress=False)
    assert plain.quantization is None
    assert report.parameters == plain.parameters
    assert found.bytes.dense - found.bytes.kept == plain.bytes.kept - report.bytes.kept > 0
    assert report.evaluation.loss_after != plain.evaluation.loss_after


@needs_torchao
def test_a_checkpoint_s_config_is_replayed(text):
    model, again = tiny_llama(), tiny_llama()
    compress(model, LowRankConfig(param_ratio=0.6, weights="int4"), text[:4], progress=False)
    config = model.config.quantization_config
    changed = dict(config.quantized)
    name = next(iter(changed))
    changed[name] = {"bits": 8, "block": [1, 32]}
    compress(again, config.replace(quantized=changed), text[:4], progress=False)
    assert precision_of(again.get_submodule(name).weight).bits == 8
    compress(again := tiny_llama(), config, text[:4], progress=False)
    assert torch.equal(logits(again, text[0]), logits(model, text[0]))


@needs_torchao
def test_a_sweep_quantizes_each_size(text):
    model = tiny_llama()
    before = logits(model, text[0])
    for report in sweep(model, PLAIN.replace(weights="int8"), [0.8, 0.6], progress=False):
        assert report.quantization.matrices == len(quantized_modules(model))
    assert torch.equal(logits(model, text[0]), before)


@needs_torchao
def test_stages_quantize_the_last_alone(text):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.6, weights="int8")
    report = compress(model, config, text[:8], recover_steps=3, stages=2, progress=False)
    assert len(report.stages) == 2
    assert report.quantization.matrices == len(quantized_modules(model))


def test_torchao_is_asked_for_before_any_work(text, monkeypatch):
    found = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "torchao" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    monkeypatch.setattr("hf_lowrank.compression.verbs.analyze", pytest.fail)
    monkeypatch.setattr("hf_lowrank.compression.application.analyze", pytest.fail)
    config, message = PLAIN.replace(weights="int8"), "^weights='int8' needs torchao 0.18 or newer"
    with pytest.raises(ConfigError, match=message):
        compress(tiny_llama(), config, progress=False)
    with pytest.raises(ConfigError, match=message):
        next(sweep(tiny_llama(), config, [0.5], progress=False))
    config = LowRankConfig(param_ratio=0.6, weights="int8")
    with pytest.raises(ConfigError, match=message):
        compress_jointly(tiny_llama(), config, text[:2], text[2:4], progress=False)


@needs_torchao
def test_a_dtype_that_torchao_does_not_take_is_refused():
    config = PLAIN.replace(weights="int4")
    with pytest.raises(ConfigError, match=r"needs a model in float32, .* got float64"):
        compress(tiny_llama().double(), config, progress=False)


@needs_torchao
def test_a_quantized_model_is_not_trained(tmp_path):
    model, config = tiny_llama(), PLAIN.replace(weights="int4")
    compress(model, config, progress=False)
    arguments = LowRankTrainingArguments(tmp_path, report_to=[])
    with pytest.raises(TargetError, match=r"q_proj\.lowrank_A: its weight is int4, which can't"):
        LowRankTrainer(model, arguments, train_dataset=[1])
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(model, TrainingArguments(tmp_path, report_to=[]), train_dataset=[1])
    with pytest.raises(TargetError, match="already compressed"):
        compress(model, PLAIN, progress=False)
    with pytest.raises(ConfigError, match=r"^get_lowrank_model returns a model to train"):
        get_lowrank_model(tiny_llama(), config)


@needs_torchao
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_adapters_train_on_quantized_factors(weights):
    model = tiny_llama()
    compress(model, PLAIN.replace(weights=weights), progress=False)
    (batch,) = batches_for(model, 1)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lowrank_A", "lowrank_B"]))
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)

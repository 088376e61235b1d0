"""The whole pipeline on every architecture: compress, save, load, equal logits."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankLinear, Report, compress
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.modeling.targets import find_targets
from tests.tiny_models import TINY_MODELS, batches_for, logits, token_batches

RATIO = 0.6
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
T5_ATTENTION = [f"layer.0.SelfAttention.{part}" for part in "qkvo"]
T5_CROSS_ATTENTION = [f"layer.1.EncDecAttention.{part}" for part in "qkvo"]
# Where the blocks are, and the linear layers of each block.
LAYERS = {
    "gpt2": {"transformer.h": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]},
    "llama": {"model.layers": [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]},
    "opt": {
        "model.decoder.layers": [
            *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
            "fc1",
            "fc2",
        ]
    },
    "bert": {
        "bert.encoder.layer": [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ]
    },
    "t5": {
        "encoder.block": [*T5_ATTENTION, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"],
        "decoder.block": [
            *T5_ATTENTION,
            *T5_CROSS_ATTENTION,
            "layer.2.DenseReluDense.wi",
            "layer.2.DenseReluDense.wo",
        ],
    },
    "phi3": {
        "model.layers": [
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ]
    },
    "mixtral": {"model.layers": ATTENTION},
    "qwen2_moe": {
        "model.layers": [
            *ATTENTION,
            *(f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")),
        ]
    },
}
IS_TIED = {
    "gpt2": True,
    "llama": True,
    "opt": True,
    "t5": True,
    "bert": None,  # no output embeddings
    "phi3": False,
    "mixtral": False,
    "qwen2_moe": False,
}
EXPERTS = {
    "mixtral": {"gate_up_proj": 4 * 128 * 32, "down_proj": 4 * 32 * 64},
    "qwen2_moe": {"gate_up_proj": 4 * 48 * 32, "down_proj": 4 * 32 * 24},
}


class Run(NamedTuple):
    """One compressed architecture."""

    name: str
    dense: Any
    model: Any
    loaded: Any
    report: Report
    batch: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=TINY_MODELS)
def run(request, tmp_path_factory):
    dense, model = TINY_MODELS[request.param](), TINY_MODELS[request.param]()
    batches = batches_for(model)
    report = compress(
        model,
        LowRankConfig(param_ratio=RATIO, channels=False, measured_prices=False),
        batches,
        progress=False,
    )
    folder: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return Run(request.param, dense, model, hf_lowrank.load(folder), report, batches[0])


def linear_layers(name):
    return {
        f"{blocks}.{index}.{layer}"
        for blocks, layers in LAYERS[name].items()
        for index in (0, 1)
        for layer in layers
    }


def test_every_architecture_is_described():
    assert set(LAYERS) == set(IS_TIED) == set(TINY_MODELS)


def test_loaded_model_has_equal_logits(run):
    assert type(run.loaded) is type(run.dense)
    expected = logits(run.model, run.batch)
    assert torch.equal(logits(run.loaded, run.batch), expected)
    assert (expected - logits(run.dense, run.batch)).abs().max() > 1e-3


def test_targets_are_exactly_the_linear_layers_of_the_blocks(run):
    assert set(find_targets(run.dense, LowRankConfig())) == linear_layers(run.name)
    assert set(run.report.ranks) == linear_layers(run.name)


def test_kept_parameters_fit_the_budget(run):
    kept = sum(
        parameter.numel()
        for layer in linear_layers(run.name)
        for part, parameter in run.model.get_submodule(layer).named_parameters()
        if not part.endswith("bias")
    )
    dense = sum(run.dense.get_submodule(layer).weight.numel() for layer in linear_layers(run.name))
    assert run.report.parameters.targeted_kept == kept
    assert run.report.parameters.targeted_dense == dense
    assert 0.95 * RATIO * dense < kept <= RATIO * dense


def test_ranks_in_the_report_are_those_in_the_model(run):
    for name, rank in run.report.ranks.items():
        layer = run.loaded.get_submodule(name)
        assert rank == (layer.rank if isinstance(layer, LowRankLinear) else None)
    assert any(rank is not None for rank in run.report.ranks.values())


def test_everything_but_the_target_weights_is_kept(run):
    """Biases, norms, embeddings, heads, routers and experts, bit by bit."""
    loaded = run.loaded.state_dict()
    targets = linear_layers(run.name)
    compared = 0
    for key, tensor in run.dense.state_dict().items():
        layer, _, part = key.rpartition(".")
        if layer in targets and run.report.ranks[layer] is not None:
            if part == "weight":
                continue
            key = f"{layer}.lowrank_B.{part}"
        assert torch.equal(loaded[key], tensor), key
        compared += 1
    assert compared > len(targets) / 2


def test_embeddings_are_tied_as_before(run):
    for model in (run.dense, run.model, run.loaded):
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        is_tied = None if head is None else head.weight is embeddings.weight
        assert is_tied == IS_TIED[run.name]


def test_whole_model_is_counted_with_tied_weights_once(run):
    assert run.report.parameters.dense == sum(p.numel() for p in run.dense.parameters())
    assert run.report.parameters.kept == sum(p.numel() for p in run.loaded.parameters())


def test_experts_are_reported_as_untouched(run):
    expected = {
        f"model.layers.{index}.mlp.experts.{part}": size
        for part, size in EXPERTS.get(run.name, {}).items()
        for index in (0, 1)
    }
    experts = {name: size for name, size in run.report.untouched.items() if "experts" in name}
    assert experts == expected


def test_loss_on_labels_is_the_same_after_loading(run):
    with torch.no_grad():
        found, expected = item_losses(run.loaded, run.batch), item_losses(run.model, run.batch)
    assert torch.equal(found.sums, expected.sums)
    assert expected.sums.sum() > 0
    if "labels" in run.batch:
        own = run.loaded(**run.batch).loss.item()
        assert own == pytest.approx(float(found.sums.sum() / found.counts.sum()), rel=1e-4)


def test_conv1d_layers_are_marked_as_such(run):
    for name, layer in run.loaded.named_modules():
        if isinstance(layer, LowRankLinear):
            dense = run.dense.get_submodule(name)
            assert layer.conv1d == isinstance(dense, Conv1D)
            assert (layer.bias is None) == (dense.bias is None)


def test_loaded_model_merges_into_the_dense_architecture(run):
    merged = hf_lowrank.merge(run.loaded)
    torch.testing.assert_close(
        logits(merged, run.batch), logits(run.model, run.batch), rtol=1e-3, atol=1e-3
    )
    assert {n: t.shape for n, t in merged.state_dict().items()} == {
        n: t.shape for n, t in run.dense.state_dict().items()
    }


def test_gpt2_at_its_real_width_and_vocabulary(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = GPT2LMHeadModel(GPT2Config(n_layer=2)).to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    del dense
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 124_439_808 - 10 * 7_087_872
    batches = token_batches(2, batch_size=1, length=32, vocabulary=50_000)
    config = LowRankConfig(param_ratio=0.6, metric="whitened")
    report = compress(model, config, batches[:1], batches[1:], progress=False)
    # 2 blocks of 768 x (2304 + 768 + 3072 + 3072) weights.
    assert report.parameters.targeted_dense == 2 * 768 * 9216
    assert 0.59 < report.parameters.targeted_kept / (2 * 768 * 9216) <= 0.6
    assert len(report.ranks) == 8
    assert report.failures == {}
    assert report.evaluation is not None
    model.save_pretrained(tmp_path / "small")
    again = hf_lowrank.load(tmp_path / "small")
    assert again.dtype == torch.bfloat16
    assert isinstance(again.transformer.h[1].mlp.c_fc, LowRankLinear)
    assert not isinstance(again.lm_head, nn.Embedding | LowRankLinear)
    assert torch.equal(logits(again, batches[1]), logits(model, batches[1]))

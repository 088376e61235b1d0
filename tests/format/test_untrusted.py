"""Checkpoints of unknown origin: each loads right or is refused with a LowRankError, in little
memory and time, whatever its config and its tensor headers say."""

import contextlib
import json
import random
import resource
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaForCausalLM

import hf_lowrank
from benchmarks import mutations
from benchmarks.damaged_checkpoints import GOOD, holds_its_tensors, try_to_load
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.headers import tensor_shapes
from tests.format import edit_config, refused
from tests.tiny_models import logits, tiny_llama, token_batches

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model = tiny_llama(num_hidden_layers=1)
    config = LowRankConfig(param_ratio=0.6, channels=True, rank_pattern={LAYER: 6})
    hf_lowrank.compress(model, config, token_batches(2), progress=False)
    assert model.config.quantization_config.narrowed
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, for a test to damage."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


def loads_right(folder: Path) -> bool:
    return holds_its_tensors(hf_lowrank.load(folder), folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mutate", "rounds"),
    [
        (mutations.mutate_config, 100),
        (mutations.mutate_settings, 100),
        (mutations.mutate_config_bytes, 60),
        (mutations.mutate_header, 100),
        (mutations.mutate_header_bytes, 60),
        (mutations.cut_file, 20),
        (mutations.change_tensors, 40),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mutated_checkpoint_loads_right_or_is_refused(
    good: Path, tmp_path: Path, mutate: mutations.Mutation, rounds: int
):
    outcomes: Counter[str] = Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(rounds):
        folder = Path(shutil.copytree(good, tmp_path / "copy", dirs_exist_ok=True))
        mutate(folder, random.Random(seed))
        found = try_to_load(folder)
        assert found.kind in GOOD, f"seed {seed}: {found}"
        assert found.seconds < 5, f"seed {seed}: too slow"
        outcomes[found.kind] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert outcomes["refused"] > rounds / 10
    assert outcomes["loaded right"] > 0 or mutate in (
        mutations.mutate_header_bytes,
        mutations.cut_file,
    )
    assert grown < 200_000, f"{grown} KiB more than before"


def set_in_config(folder: Path, **changes: Any) -> None:
    edit_config(folder, lambda config: config.update(changes))


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels", "num_local_experts"])
@pytest.mark.parametrize("count", [10**9, 1e12, [10**7]])
def test_counts_that_the_tensors_do_not_bear_out_are_refused(folder: Path, name: str, count: Any):
    set_in_config(folder, **{name: count})
    refused(folder, f"config.json has {name} 10*.*, more than its 12 tensors can be for")


def test_a_count_inside_another_config_is_refused(folder: Path):
    set_in_config(folder, text_config={"vision": {"depths": [2, 10**9]}})
    refused(folder, "config.json has depths 1000000000, more than")


def test_a_model_far_larger_than_its_file_is_refused(folder: Path):
    set_in_config(folder, tie_word_embeddings=False, attention_bias=True, hidden_size=10**9)
    refused(folder, r"describes a model of [\d,]+ numbers, the tensors hold [\d,]+\.$")


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """A small model that makes a large mask in each layer, which is not saved."""
    folder = tmp_path / "masked"
    kinds = [[["global", "local"], 2]]
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_heads": 4, "num_layers": 4}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=kinds, eos_token_id=1))
    config = LowRankConfig(param_ratio=0.6, metric="plain")
    hf_lowrank.compress(model, config, progress=False)
    model.save_pretrained(folder)
    return folder


def test_buffers_that_are_not_saved_may_be_larger_than_the_file(masked: Path):
    model: Any = hf_lowrank.load(masked)
    buffers = sum(buffer.numel() for buffer in model.buffers())
    assert buffers > 10_000_000 + 4 * (masked / "model.safetensors").stat().st_size
    assert loads_right(masked)


def test_buffers_that_are_not_saved_have_a_limit_too(masked: Path):
    set_in_config(masked, max_position_embeddings=20_000)
    refused(masked, r"1,600,000,\d+ numbers in buffers that are not saved, the tensors hold [\d,]+")


def test_buffers_that_are_saved_count_as_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch):
    start = LlamaForCausalLM.__init__

    def with_buffer(self: Any, config: Any) -> None:
        start(self, config)
        self.register_buffer("large", torch.zeros(20_000_000, device="meta"))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)
    refused(folder, r"describes a model of 20,\d{3},\d{3} numbers, the tensors hold [\d,]+\.$")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernels", {"": "someone/kernels"}])
def test_code_from_the_hub_is_refused(folder: Path, key: str, value: Any):
    set_in_config(folder, **{key: value})
    refused(folder, "code from the Hub")


def test_other_weights_than_those_checked_are_refused(folder: Path):
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    set_in_config(folder, transformers_weights="other.safetensors")
    refused(folder, "config.json has transformers_weights, which is not read here")


def test_code_beside_the_weights_is_not_run(folder: Path):
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    (folder / "modeling_lowrank.py").write_text(code, "utf-8")
    (folder / "evil.py").write_text(code, "utf-8")
    set_in_config(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    assert loads_right(folder)
    set_in_config(folder, model_type="no_such_type")
    refused(folder, "contains custom code which must be executed")
    assert not ran.exists()


def test_pickled_weights_are_not_read(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "has no model.safetensors")


def test_an_adapter_beside_the_model_is_refused(folder: Path):
    (folder / "adapter_config.json").write_text("{}", "utf-8")
    refused(folder, "holds an adapter beside the model; move it to a folder of its own")


def test_the_single_file_is_read_before_an_index_as_transformers_does(folder: Path):
    """An index that would send the check to harmless files while others are loaded."""
    shutil.copyfile(folder / "model.safetensors", folder / "harmless.safetensors")
    index = {"weight_map": {"a": "harmless.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    before = tensor_shapes(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert tensor_shapes(folder) == before | {"model.norm.weight": [5]}
    refused(folder, r"model.norm.weight has shape \[5\], config.json asks for \[32\]")


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 3, ""]
)
def test_an_index_leads_nowhere_else(folder: Path, file: Any):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"a": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    refused(folder, "which is no safetensors file here")


@pytest.mark.parametrize("depth", [900, 100_000])
def test_deep_nesting_is_refused(folder: Path, depth: int):
    text = (folder / "config.json").read_text("utf-8").rstrip().removesuffix("}")
    nested = "[" * depth + "]" * depth
    (folder / "config.json").write_text(f'{text}, "deep": {nested}}}', "utf-8")
    with contextlib.suppress(CheckpointError):
        assert loads_right(folder)


def test_a_good_checkpoint_still_loads(folder: Path):
    batch = token_batches(1)[0]
    assert loads_right(folder)
    model: Any = hf_lowrank.load(folder)
    assert torch.isfinite(logits(model, batch)).all()


@pytest.mark.parametrize("name", ["layer_rope_theta", "_label_trainable_num_channels"])
def test_a_rotary_base_or_a_width_is_no_count(folder: Path, name: str):
    """Some models name it after layers or labels."""
    set_in_config(folder, **{name: 500_000.0})
    assert loads_right(folder)


def test_an_empty_tensor_bears_out_no_count(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["empty"] = torch.zeros(0, 10**10)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_in_config(folder, num_hidden_layers=10**9)
    refused(folder, "config.json has num_hidden_layers 1000000000, more than")


@pytest.mark.parametrize("value", ["\ud800", {"\ud800": 1}, ["a", ["\udfff"]]])
def test_half_a_character_is_refused(folder: Path, value: Any):
    set_in_config(folder, unknown=value)
    refused(folder, r"no readable config\.json \(.*surrogates not allowed\)")


@pytest.mark.parametrize("place", ["config", "narrowed", "architectures"])
def test_nesting_beyond_any_config_is_refused(folder: Path, place: str):
    nested: Any = "x"
    for _ in range(400):
        nested = [nested]

    def nest(config: dict[str, Any]) -> None:
        holder = config["quantization_config"] if place == "narrowed" else config
        holder[place] = nested

    edit_config(folder, nest)
    refused(folder, r"no readable config\.json \(it is nested more than 64 deep\)")


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, '{"weight_map": {"a": "\\ud800"}}'])
def test_a_deep_or_broken_index_is_refused(folder: Path, text: str):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(text, "utf-8")
    refused(folder, "not a readable index of tensors")

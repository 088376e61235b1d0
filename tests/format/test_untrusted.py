"""Checkpoints of unknown origin: each loads right or is refused with a LowRankError, in little
memory and time, whatever its config and its tensor headers say."""

import contextlib
import copy
import json
import random
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankError
from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.headers import check_checkpoint, tensor_shapes
from tests.format import edit_config, refused
from tests.tiny_models import logits, tiny_llama, token_batches

LAYER = "model.layers.0.self_attn.q_proj"
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 33, 10**6, 10**9, 2**63, 10**30, 1.5, -0.5, 1e30),
    *(
        "",
        "lowrank",
        "factors",
        "cuda",
        "../../etc/passwd",
        "a/b",
        "\0",
        "x" * 10_000,
        "é\ud7ff",
        "\ud800",
    ),
    *([], [1], [10**9], ["lowrank"], [[]], {}, {"": 1}, {"a": {"b": 10**12}}, float("inf")),
    *(float("nan"), "1", "F32", "float16", "LlamaModel", "GPT2LMHeadModel", "eager"),
]
NAMES = [
    *("num_hidden_layers", "hidden_size", "num_labels", "num_local_experts", "layer_types"),
    *("auto_map", "transformers_weights", "dtype", "torch_dtype", "attn_implementation"),
    *("id2label", "rope_scaling", "rope_parameters", "tie_word_embeddings", "text_config"),
    *("use_cache", "problem_type", "pruned_heads", "is_decoder", "output_attentions", "unknown"),
    *(
        "ranks",
        "narrowed",
        "channels",
        "form",
        "format_version",
        "rank",
        "param_ratio",
        "shape",
        "data_offsets",
    ),
]


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


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside nested JSON."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = [path] if path else []
    for key, item in inner:
        found += places(item, (*path, key))
    return found


def mutate_json(value: Any, chance: random.Random) -> None:
    """One to three changes: a value replaced, moved, removed, scaled or added."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        path = chance.choice(places(value) or [("x",)])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], chance.randrange(6)
        present = key in holder if isinstance(holder, dict) else key < len(holder)
        old = holder[key] if present else None
        if kind == 0 and present:
            del holder[key]
        elif kind == 1 and isinstance(old, int):
            holder[key] = old + chance.choice((-1, 1, old, 10**9, -old))
        elif kind == 2 and isinstance(holder, dict):
            holder[chance.choice(NAMES)] = copy.deepcopy(chance.choice(VALUES))
        elif kind == 3 and isinstance(holder, dict) and present:
            holder[str(key) + chance.choice(("x", ".weight", "\0", ".."))] = holder.pop(key)
        elif kind == 4 and isinstance(old, str):
            holder[key] = chance.choice((old[:-1], old + "x", old.upper()))
        else:
            holder[key] = copy.deepcopy(chance.choice(VALUES))


def flip_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def mutate_config(folder: Path, chance: random.Random) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    mutate_json(config, chance)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def mutate_settings(folder: Path, chance: random.Random) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    mutate_json(config["quantization_config"], chance)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def mutate_config_bytes(folder: Path, chance: random.Random) -> None:
    path = folder / "config.json"
    path.write_bytes(flip_bytes(path.read_bytes(), chance))


def split_header(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def mutate_header(folder: Path, chance: random.Random) -> None:
    path = folder / "model.safetensors"
    header, tensors = split_header(path.read_bytes())
    entries = json.loads(header)
    mutate_json(entries, chance)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def mutate_header_bytes(folder: Path, chance: random.Random) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = 8 + len(split_header(data)[0])
    path.write_bytes(flip_bytes(data[:size], chance) + data[size:])


def loads_right(folder: Path) -> bool:
    """Whether the loaded model holds the tensors of the file, in the type that it is loaded in."""
    model: Any = hf_lowrank.load(folder)
    state = model.state_dict()
    stored = load_file(folder / "model.safetensors")
    return set(stored) <= set(state) and all(
        state[name].shape == tensor.shape and torch.equal(state[name], tensor.to(state[name].dtype))
        for name, tensor in stored.items()
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mutate", "rounds"),
    [
        (mutate_config, 500),
        (mutate_settings, 500),
        (mutate_config_bytes, 300),
        (mutate_header, 500),
        (mutate_header_bytes, 300),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mutated_checkpoint_loads_right_or_is_refused(
    good: Path, folder: Path, mutate: Callable[[Path, random.Random], None], rounds: int
):
    outcomes: Counter[str] = Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(rounds):
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(good / name, folder / name)
        mutate(folder, random.Random(seed))
        start = time.process_time()
        try:
            check_checkpoint(folder)
            assert loads_right(folder), f"seed {seed}: other tensors than in the file"
            outcomes["loaded"] += 1
        except LowRankError:
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        assert time.process_time() - start < 5, f"seed {seed}: too slow"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert outcomes["refused"] > rounds / 10
    assert outcomes["loaded"] > 0 or mutate is mutate_header_bytes
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


def test_a_rotary_base_is_no_count(folder: Path):
    """Some models name it after their layers: layer_rope_theta."""
    set_in_config(folder, layer_rope_theta=500_000.0)
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

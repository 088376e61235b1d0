"""Seeded damage to a checkpoint folder: config.json, the index, headers, and the tensors."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 33, 10**6, 10**9, 2**63, 10**30, 1.5, -0.5, 1e30),
    *("", "lowrank", "factors", "cuda", "../../etc/passwd", "a/b", "\0", "x" * 10_000),
    *("é\ud7ff", "\ud800", "1", "F32", "float16", "LlamaModel", "GPT2LMHeadModel", "eager"),
    *([], [1], [10**9], ["lowrank"], [[]], {}, {"": 1}, {"a": {"b": 10**12}}),
    *(float("inf"), float("nan")),
]
NAMES = [
    *("num_hidden_layers", "hidden_size", "num_labels", "num_local_experts", "layer_types"),
    *("auto_map", "transformers_weights", "dtype", "torch_dtype", "attn_implementation"),
    *("id2label", "rope_scaling", "rope_parameters", "tie_word_embeddings", "text_config"),
    *("use_cache", "problem_type", "pruned_heads", "is_decoder", "output_attentions", "unknown"),
    *("ranks", "narrowed", "channels", "form", "format_version", "rank", "param_ratio", "shape"),
    *("weights", "quantized", "block", "bits"),
    "data_offsets",
]
Mutation = Callable[[Path, random.Random], None]


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside nested JSON."""
    inner: Iterable[tuple[Any, object]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    found = [path] if path else []
    for key, item in inner:
        found += places(item, (*path, key))
    return found


def mutate_json(value: Any, chance: random.Random) -> None:  # noqa: ANN401
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
    """One to five bytes with new values."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def mutate_config(folder: Path, chance: random.Random) -> None:
    """Changes anywhere in config.json."""
    _edit(folder / CONFIG, lambda config: mutate_json(config, chance))


def mutate_settings(folder: Path, chance: random.Random) -> None:
    """Changes in what config.json says of the compression."""
    _edit(folder / CONFIG, lambda config: mutate_json(config["quantization_config"], chance))


def mutate_config_bytes(folder: Path, chance: random.Random) -> None:
    """Other bytes in config.json."""
    path = folder / CONFIG
    path.write_bytes(flip_bytes(path.read_bytes(), chance))


def mutate_index(folder: Path, chance: random.Random) -> None:
    """Changes in the index of a sharded checkpoint, in its values or its bytes."""
    path = folder / INDEX
    if chance.random() < 0.7:
        _edit(path, lambda index: mutate_json(index, chance))
    else:
        path.write_bytes(flip_bytes(path.read_bytes(), chance))


def mutate_header(folder: Path, chance: random.Random) -> None:
    """Changes in the header of a file of weights, which stays as long as its length says."""
    path = _weights(folder, chance)
    header, tensors = split_header(path.read_bytes())
    entries = json.loads(header)
    mutate_json(entries, chance)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def mutate_header_bytes(folder: Path, chance: random.Random) -> None:
    """Other bytes in the header of a file of weights, or in its length."""
    path = _weights(folder, chance)
    data = path.read_bytes()
    size = 8 + len(split_header(data)[0])
    path.write_bytes(flip_bytes(data[:size], chance) + data[size:])


def cut_file(folder: Path, chance: random.Random) -> None:
    """A file of weights that breaks off, goes on for too long, or is not there."""
    path = _weights(folder, chance)
    data = path.read_bytes()
    if chance.random() < 0.1:
        path.unlink()
    elif chance.random() < 0.2:
        path.write_bytes(data + chance.randbytes(chance.choice((1, 8, 1000))))
    else:
        path.write_bytes(data[: chance.randrange(len(data))])


def change_tensors(folder: Path, chance: random.Random) -> None:
    """One tensor gone, added, cut, reshaped or of another type, or two that change places.

    The file itself is sound. Tensors that change places differ in shape: of equal ones no reader
    could know.
    """
    path = _weights(folder, chance)
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    tensor, kind = tensors[name], chance.randrange(6)
    others = sorted(n for n, t in tensors.items() if t.shape != tensor.shape)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name + chance.choice(("x", ".weight", "2"))] = tensor.clone()
    elif kind == 2:
        axis = chance.randrange(tensor.ndim)
        tensors[name] = tensor.narrow(axis, 0, chance.randrange(tensor.shape[axis])).contiguous()
    elif kind == 3:
        shape = chance.choice(([-1], [1, *tensor.shape], tensor.shape[::-1]))
        tensors[name] = tensor.reshape(shape).contiguous()
    elif kind == 4:
        tensors[name] = tensor.to(chance.choice((torch.int32, torch.bool, torch.bfloat16)))
    elif others:
        other = chance.choice(others)
        tensors[name], tensors[other] = tensors[other], tensor
    save_file(tensors, path, {"format": "pt"})


MUTATIONS: tuple[Mutation, ...] = (
    *(mutate_config, mutate_settings, mutate_config_bytes, mutate_index),
    *(mutate_header, mutate_header_bytes, cut_file, change_tensors),
)


def split_header(data: bytes) -> tuple[bytes, bytes]:
    """Header and tensors of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")


def _weights(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.glob("*.safetensors")))

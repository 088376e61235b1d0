"""What a checkpoint of unknown origin says about itself, checked before anything is allocated.

Only `config.json` and the safetensors headers are read; nothing is unpickled or executed. Every
size that could drive a loop or an allocation is held against the bytes that really are there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.forms.stored_form import listed_layers
from hf_lowrank.format.layout import QUANT_METHOD, Layout

_MAX_JSON_BYTES = 100_000_000
_MAX_DEPTH = 64
_WEIGHTS = "model.safetensors"
# Settings that make transformers build a list or a module for each unit of their value.
_COUNTED = re.compile(r"layer|depth|block|expert|stage|stack|label|group")
# Such a name means no count after all: a rotary base, the width of something.
_UNCOUNTED = re.compile(r"theta|channel")
# Would send transformers to other weights than those that were checked.
_REDIRECTS = ("transformers_weights",)


class Checked(NamedTuple):
    """What `config.json` and the headers say.

    Attributes:
        config: All of `config.json`.
        layout: What its `quantization_config` says of the layers.
        shapes: Shape of every tensor, by the name that it has in the file.
    """

    config: dict[str, Any]
    layout: Layout
    shapes: dict[str, list[int]]


def pinned(folder: str | Path, hub: dict[str, Any]) -> dict[str, Any]:
    """Options of the Hub with the commit that `revision` means now in its place.

    Every file is then read from one commit, also if somebody pushes in between.

    Raises:
        CheckpointError: There is no `config.json`.
    """
    path = resolve_file(folder, "config.json", **hub)
    commit = None if Path(folder).is_dir() else extract_commit_hash(str(path), None)
    return {**hub, "revision": commit} if commit else hub


def check_checkpoint(folder: str | Path, **hub: Any) -> Checked:
    """Reads `config.json` and the tensors' headers and checks what needs no model, before any load.

    Args:
        folder: Checkpoint folder, or a repository id on the Hub.
        **hub: `revision`, `token`, ... as in `from_pretrained`.

    Raises:
        CheckpointError: With the first thing that does not fit.
    """
    try:
        config: Any = _read_json(resolve_file(folder, "config.json", **hub))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: no readable config.json ({error}).") from error
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{folder}: not a checkpoint of hf_lowrank (config.json has no quantization_config "
            f"with quant_method {QUANT_METHOD!r})."
        )
    try:
        layout = Layout.from_settings(settings)
        listed_layers(layout)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: bad quantization_config: {error}") from error
    shapes = tensor_shapes(folder, **hub)
    _check_settings(folder, {k: v for k, v in config.items() if v is not settings}, shapes)
    return Checked(config, layout, shapes)


def tensor_shapes(folder: str | Path, **hub: Any) -> dict[str, list[int]]:
    """Shapes of all tensors of a checkpoint, from the safetensors headers alone.

    Reads the files that transformers reads: the single file where there is one, else the index.

    Raises:
        CheckpointError: A file is missing, or is no safetensors file of its size.
    """
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder, hub):
        found = header_shapes(resolve_file(folder, file, **hub))
        twice = next((name for name in found if name in shapes), None)
        if twice is not None:
            raise CheckpointError(f"{folder}: {twice} is in two files.")
        shapes |= found
    return shapes


def resolve_file(folder: str | Path, name: str, **hub: Any) -> Path:
    """Path of a checkpoint's file, in a local folder or in the Hub's cache.

    Raises:
        CheckpointError: There is no such file.
    """
    if Path(folder).is_dir():
        path = Path(folder) / (hub.get("subfolder") or "") / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: has no {name}.")
        return path
    if os.path.sep in str(folder) and str(folder).count("/") != 1:
        raise CheckpointError(f"{folder}: no such folder.")
    try:
        return Path(str(cached_file(str(folder), name, **hub)))
    except OSError as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise CheckpointError(
            f"{folder}: neither a folder nor reachable on the Hub ({reason})"
        ) from error


def weight_files(folder: str | Path, hub: dict[str, Any]) -> list[str]:
    """Names of a checkpoint's safetensors files: the single one, or those of its index.

    Raises:
        CheckpointError: There is neither, or the index is damaged.
    """
    try:
        resolve_file(folder, _WEIGHTS, **hub)
    except CheckpointError as error:
        try:
            index = resolve_file(folder, f"{_WEIGHTS}.index.json", **hub)
        except CheckpointError:
            raise error from None
        return _indexed_files(index)
    return [_WEIGHTS]


def _indexed_files(path: Path) -> list[str]:
    try:
        files = sorted(set(_read_json(path)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable index of tensors ({error!r}).") from error
    for file in files:
        # "model-00001-of-00002.safetensors"; no way out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(f"{path}: names {file!r}, which is no safetensors file here.")
    if not files:
        raise CheckpointError(f"{path}: names no file.")
    return files


def _read_json(path: Path) -> Any:  # noqa: ANN401
    """A JSON file's content.

    Raises:
        ValueError: It is too large, no JSON, nested too deep, or holds half a character.
        RecursionError: It is nested deeper still.
    """
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"its {size} bytes are too many")
    value = json.loads(path.read_text("utf-8"))
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        level = [item for each in level for item in _items(each)]
    json.dumps(value, ensure_ascii=False).encode()  # refuses a lone half of a surrogate pair
    return value


def _items(value: Any) -> Iterable[Any]:  # noqa: ANN401
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def header_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name; safetensors refuses a header that does not account for every byte.

    Raises:
        CheckpointError: It does.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}).") from error


def _check_settings(
    folder: str | Path, config: dict[str, Any], shapes: dict[str, list[int]]
) -> None:
    """Refuses counts that the tensors do not bear out, and ways to other files or to code."""
    filled = [shape for shape in shapes.values() if 0 not in shape]  # an empty one costs no bytes
    most = max([len(shapes), 1000, *(size for shape in filled for size in shape)])
    for path, value in _leaves(config):
        key = path[-1]
        if key in _REDIRECTS:
            raise CheckpointError(f"{folder}: config.json has {key}, which is not read here.")
        if any(part.endswith("_implementation") for part in path) and "/" in str(value):
            raise CheckpointError(
                f"{folder}: config.json asks for {'.'.join(path)} {value!r}, code from the Hub."
            )
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_count = is_number and _COUNTED.search(key) and not _UNCOUNTED.search(key)
        if is_count and value > most:
            raise CheckpointError(
                f"{folder}: config.json has {key} {value}, more than its {len(shapes)} tensors "
                "can be for."
            )


def _leaves(
    value: Any,  # noqa: ANN401
    path: tuple[str, ...] = (),
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys down to it, value) of everything in nested JSON; a list's items share its keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value

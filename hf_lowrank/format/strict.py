"""The strict way in: `load` refuses a checkpoint that does not fit exactly."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import find_adapter_config_file

from hf_lowrank.errors import CheckpointError, ConfigError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.feed_forward import named_feed_forwards
from hf_lowrank.format.forms.stored_form import (
    form_names,
    listed_layers,
    stored_form,
    stored_tensors,
)
from hf_lowrank.format.fused_experts import small_experts
from hf_lowrank.format.headers import Checked, check_checkpoint, pinned
from hf_lowrank.format.layout import Layout
from hf_lowrank.format.rebuild import narrowed_layers, replace_with_lowrank_, resolve_module_name

# Saved numbers that a model may have beyond four times its tensors' elements.
_SPARE_ELEMENTS = 10_000_000
# Numbers in buffers that are not saved but made again, such as GPT-Neo's mask in each layer.
_REBUILT_ELEMENTS = 250_000_000
# How much larger merging may make narrowed layers than all tensors are.
_MERGED = 100
# Keywords of `from_pretrained` that say where on the Hub the files are and how to get them.
_HUB = frozenset(
    ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
)
# Keywords that would make it read other weights than those that were checked.
_OTHER_WEIGHTS = ("gguf_file", "state_dict", "use_safetensors", "variant")


def load(folder: str | Path, **kwargs: Any) -> nn.Module:
    """Loads a compressed checkpoint and refuses anything that does not fit exactly.

    Args:
        folder: Checkpoint folder, or a repository id on the Hub.
        **kwargs: Passed on to `from_pretrained` (`dtype`, `revision`, `token`, ...). What says
            where the files are holds for the checks, too.

    Returns:
        The native transformers model, in eval mode.

    Raises:
        CheckpointError: The folder is no compressed checkpoint, its config does not fit its
            tensors, or keys are missing or left over.
        ConfigError: A keyword asks for other weights than `model.safetensors`.
    """
    other = [key for key in _OTHER_WEIGHTS if kwargs.get(key) not in (None, True)]
    if other:
        raise ConfigError(
            f"load reads model.safetensors, which it has checked; leave out {', '.join(other)}."
        )
    hub = pinned(folder, {key: value for key, value in kwargs.items() if key in _HUB})
    model_class, checked = _read(folder, hub)
    try:
        _check_model(folder, model_class, checked, hub)
        model, info = model_class.from_pretrained(
            folder, **kwargs | hub | {"output_loading_info": True, "use_safetensors": True}
        )
    except CheckpointError:
        raise
    except Exception as error:  # a damaged checkpoint can raise anything
        raise _damaged(folder, error) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        _refuse_keys(folder, kind, info.get(kind) or ())
    loaded: nn.Module = model
    return loaded


def check(folder: str | Path, **hub: Any) -> None:
    """Refuses what `load` refuses and reads no tensor; for engines that load by themselves.

    Args:
        folder: Checkpoint folder, or a repository id on the Hub.
        **hub: `revision`, `token`, ... as in `from_pretrained`.

    Raises:
        CheckpointError: As `load` does.
    """
    hub = pinned(folder, hub)
    model_class, checked = _read(folder, hub)
    try:
        skeleton, stored = _check_model(folder, model_class, checked, hub)
    except CheckpointError:
        raise
    except Exception as error:
        raise _damaged(folder, error) from error
    state, tied = skeleton.state_dict().keys(), skeleton.all_tied_weights_keys
    missing = {name for name in state - stored if tied.get(name) not in stored}
    for kind, names in (("missing", missing), ("unexpected", stored - state)):
        patterns = getattr(skeleton, f"_keys_to_ignore_on_load_{kind}") or ()
        left = [name for name in names if not any(re.search(each, name) for each in patterns)]
        _refuse_keys(folder, f"{kind}_keys", left)


def _refuse_keys(folder: str | Path, kind: str, keys: Collection[Any]) -> None:
    if keys:
        first = min(str(key) for key in keys)
        raise CheckpointError(
            f"{folder}: {len(keys)} {kind.replace('_', ' ')}, for example {first}; the "
            "checkpoint does not fit its config."
        )


def _damaged(folder: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder}: {' '.join(str(error).split())}")


def _read(folder: str | Path, hub: dict[str, Any]) -> tuple[Any, Checked]:
    """(class of the model, what config.json and the headers say), checked without a model."""
    checked = check_checkpoint(folder, **hub)
    if find_adapter_config_file(str(folder), **hub) is not None:
        raise CheckpointError(
            f"{folder}: holds an adapter beside the model; move it to a folder of its own and load "
            "it with peft.PeftModel.from_pretrained."
        )
    listed = checked.config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and hasattr(model_class, "from_pretrained")):
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} has no class {name or listed!r}, "
            "which config.json names as the architecture."
        )
    return model_class, checked


def _check_model(
    folder: str | Path,
    model_class: Any,  # noqa: ANN401
    checked: Checked,
    hub: dict[str, Any],
) -> tuple[Any, set[str]]:
    """Compares the tensors' headers with the model that the config describes, on meta.

    Returns:
        The model, and the names in it of all that is stored.

    Raises:
        CheckpointError: With the first layer or tensor that does not fit, or if the model is far
            larger than the file.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **hub)
    layout = checked.layout
    with torch.device("meta"):
        skeleton = model_class(config)
        replace_with_lowrank_(skeleton, layout)
    _check_sizes(folder, skeleton, sum(math.prod(shape) for shape in checked.shapes.values()))
    shapes, converted = _shapes_in_model(folder, skeleton, checked.shapes)
    _check_layers(folder, skeleton, layout, shapes)
    _check_feed_forwards(folder, skeleton)
    for name, tensor in skeleton.state_dict().items():
        if name in shapes and list(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {shapes[name]}, config.json asks for "
                f"{list(tensor.shape)}."
            )
    return skeleton, shapes.keys() | converted


def names_in_model(model: Any, keys: Iterable[str]) -> Iterator[tuple[str, str, bool]]:  # noqa: ANN401
    """Each stored tensor, its name in a model, and whether transformers splits or joins it there.

    Args:
        model: A transformers model, maybe on the meta device.
        keys: Names of tensors as they are stored.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()
    for key in keys:
        name, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if name not in state and key in state:
            name, converter = key, None
        yield key, name, converter is not None


def _shapes_in_model(
    folder: str | Path,
    skeleton: Any,  # noqa: ANN401
    stored: dict[str, list[int]],
) -> tuple[dict[str, list[int]], set[str]]:
    """Stored shapes by the names in the model, which transformers renames on saving and loading.

    Apart from them the names of the tensors that it also splits or joins while loading: it checks
    their shapes itself.
    """
    state = skeleton.state_dict()
    shapes: dict[str, list[int]] = {}
    others: set[str] = set()
    joined: Counter[str] = Counter()
    for key, name, is_converted in names_in_model(skeleton, stored):
        shape = stored[key]
        if name in shapes:
            raise CheckpointError(f"{folder}: two tensors are for {name}, one of them {key}.")
        if is_converted:
            others.add(name)
        else:
            shapes[name] = shape
        joined[name] += math.prod(shape)
    for module in small_experts(skeleton):
        for name in (key for key in state if key.rpartition(".")[0] == module):
            if joined[name] != state[name].numel():
                raise CheckpointError(
                    f"{folder}: {name} has {joined[name]:,} numbers, config.json asks for "
                    f"{state[name].numel():,}, of shape {[*state[name].shape]}."
                )
    return shapes, others


def _check_layers(
    folder: str | Path, skeleton: nn.Module, layout: Layout, shapes: dict[str, list[int]]
) -> None:
    """Compares what config.json says of each layer with the layer's tensors."""
    for saved_name, form, entry in listed_layers(layout):
        name = resolve_module_name(skeleton, saved_name) or saved_name
        shape = linear_shape(skeleton.get_submodule(name))
        expected = stored_tensors(saved_name, form, shape, entry, layout)
        wanted = [list(shape) for shape in expected.values()]
        stored = [shapes.get(f"{name}.{tensor}") for tensor in expected]
        said = list(entry) if isinstance(entry, tuple) else entry
        given = f"{folder}: {name} has {form.entry} {said} in config.json but"
        if None in stored:
            raise CheckpointError(f"{given} no {form.content}.")
        if stored != wanted:
            raise CheckpointError(
                f"{given} {form.content} of shape {_and(stored)}; it asks for {_and(wanted)}."
            )
    factors = {tensor for each in map(stored_form, form_names()) for tensor in each.tensors}
    for saved_name in (name for name, rank in layout.ranks.items() if rank is None):
        name = resolve_module_name(skeleton, saved_name) or saved_name
        if any(f"{name}.{tensor}" in shapes for tensor in factors):
            raise CheckpointError(f"{folder}: {name} is dense in config.json but has factors.")


def _and(shapes: Sequence[list[int] | None]) -> str:
    """[1, 2] and [3, 4]."""
    return " and ".join(map(str, shapes))


def _check_feed_forwards(folder: str | Path, skeleton: nn.Module) -> None:
    """Refuses narrowed layers that do not fit the others of their feed-forward."""
    small = narrowed_layers(skeleton)
    blocks = named_feed_forwards(skeleton, small)
    for name in small.keys() - {name for _, block in blocks for name in block.names}:
        raise CheckpointError(
            f"{folder}: config.json narrows {name} to {[*linear_shape(small[name])]}, which does "
            "not fit the other layers of its feed-forward."
        )


def _check_sizes(folder: str | Path, skeleton: nn.Module, stored: int) -> None:
    """Refuses a model that is far larger than the numbers that are stored, also once merged."""
    saved = skeleton.state_dict().keys()
    rebuilt = sum(b.numel() for name, b in skeleton.named_buffers() if name not in saved)
    wanted = sum(t.numel() for t in (*skeleton.parameters(), *skeleton.buffers())) - rebuilt
    if wanted > 4 * stored + _SPARE_ELEMENTS:
        raise CheckpointError(
            f"{folder}: config.json describes a model of {wanted:,} numbers, the tensors hold "
            f"{stored:,}."
        )
    if rebuilt > 4 * stored + _REBUILT_ELEMENTS:
        raise CheckpointError(
            f"{folder}: config.json describes a model with {rebuilt:,} numbers in buffers that "
            f"are not saved, the tensors hold {stored:,}."
        )
    merged = sum(math.prod(layer.dense_shape) for layer in narrowed_layers(skeleton).values())
    if merged > _MERGED * stored + _SPARE_ELEMENTS:
        raise CheckpointError(
            f"{folder}: config.json says that the narrowed layers once had {merged:,} weights, the "
            f"tensors hold {stored:,} numbers."
        )

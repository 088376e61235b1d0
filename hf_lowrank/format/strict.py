"""The strict way in: `load` refuses a checkpoint that does not fit exactly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
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
from hf_lowrank.format.forms.stored_form import form_names, listed_layers, stored_form
from hf_lowrank.format.fused_experts import small_experts
from hf_lowrank.format.headers import Checked, check_checkpoint, pinned
from hf_lowrank.format.layout import Layout
from hf_lowrank.format.rebuild import narrowed_layers, replace_with_lowrank, resolve_module_name
from hf_lowrank.format.torchao_weights import stored_shapes

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
    try:
        _check_model(folder, model_class, checked, hub)
        model, info = model_class.from_pretrained(
            folder, **kwargs | hub | {"output_loading_info": True, "use_safetensors": True}
        )
    except CheckpointError:
        raise
    except Exception as error:  # a damaged checkpoint can raise anything
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(str(key) for key in info[kind])
            raise CheckpointError(
                f"{folder}: {len(names)} {kind.replace('_', ' ')}, for example {names[0]}; the "
                "checkpoint does not fit its config."
            )
    loaded: nn.Module = model
    return loaded


def _check_model(
    folder: str | Path,
    model_class: Any,  # noqa: ANN401
    checked: Checked,
    hub: dict[str, Any],
) -> None:
    """Compares the tensors' headers with the model that the config describes, on meta.

    Raises:
        CheckpointError: With the first layer or tensor that does not fit, or if the model is far
            larger than the file.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **hub)
    layout = checked.layout
    with torch.device("meta"):
        skeleton = model_class(config)
        replace_with_lowrank(skeleton, layout)
    _check_sizes(folder, skeleton, sum(math.prod(shape) for shape in checked.shapes.values()))
    shapes = _shapes_in_model(folder, skeleton, checked.shapes)
    _check_layers(folder, skeleton, layout, shapes)
    _check_feed_forwards(folder, skeleton)
    for name, tensor in skeleton.state_dict().items():
        if name in shapes and list(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {shapes[name]}, config.json asks for "
                f"{list(tensor.shape)}."
            )


def _shapes_in_model(
    folder: str | Path,
    skeleton: Any,  # noqa: ANN401
    stored: dict[str, list[int]],
) -> dict[str, list[int]]:
    """Stored shapes by the names in the model, which transformers renames on saving and loading.

    Without the tensors that it also splits or joins while loading: it checks their shapes itself.
    """
    conversions = get_model_conversion_mapping(skeleton)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    prefix, state = skeleton.base_model_prefix, skeleton.state_dict()
    shapes: dict[str, list[int]] = {}
    joined: Counter[str] = Counter()
    for key, shape in stored.items():
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converted = key, None
        if name in shapes:
            raise CheckpointError(f"{folder}: two tensors are for {name}, one of them {key}.")
        if converted is None:
            shapes[name] = shape
        joined[name] += math.prod(shape)
    for module in small_experts(skeleton):
        for name in (key for key in state if key.rpartition(".")[0] == module):
            if joined[name] != state[name].numel():
                raise CheckpointError(
                    f"{folder}: {name} has {joined[name]:,} numbers, config.json asks for "
                    f"{state[name].numel():,}, of shape {[*state[name].shape]}."
                )
    return shapes


def _check_layers(
    folder: str | Path, skeleton: nn.Module, layout: Layout, shapes: dict[str, list[int]]
) -> None:
    """Compares what config.json says of each layer with the layer's tensors."""
    for saved_name, form, entry in listed_layers(layout):
        name = resolve_module_name(skeleton, saved_name) or saved_name
        whole = form.shapes(linear_shape(skeleton.get_submodule(name)), entry)
        tensors = dict(zip(form.tensors, whole, strict=True))
        expected = _as_stored(saved_name, tensors, layout)
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


def _as_stored(
    name: str, tensors: dict[str, tuple[int, ...]], layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Shapes by the tensors' ends, with what a file holds of each quantized weight in its place."""
    found: dict[str, tuple[int, ...]] = {}
    for tensor, shape in tensors.items():
        module, _, end = f"{name}.{tensor}".rpartition(".")
        precision = layout.quantized.get(module) if end == "weight" else None
        if precision is None:
            found[tensor] = shape
            continue
        before = tensor.removesuffix("weight")
        parts = stored_shapes((shape[0], shape[1]), precision)
        found |= {f"{before}{part}": part_shape for part, part_shape in parts.items()}
    return found


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

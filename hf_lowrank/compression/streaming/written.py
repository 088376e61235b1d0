"""The compressed checkpoint, a file for each block, and the `save_pretrained` that hands it out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.compression.application import decided_precisions, quantization_of
from hf_lowrank.compression.streaming.block_stream import BlockStream, plan_key
from hf_lowrank.compression.streaming.tensors import CheckpointTensors
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.errors import StorageError
from hf_lowrank.evaluation.size import weight_bytes
from hf_lowrank.files import atomic_file
from hf_lowrank.format.headers import header_shapes
from hf_lowrank.format.layout import Layout
from hf_lowrank.format.marking import saved_names_are_lost, write_loading_code
from hf_lowrank.format.rebuild import replace_with_lowrank_
from hf_lowrank.format.torchao_weights import assemble_, expect_
from hf_lowrank.measuring.progress import track
from hf_lowrank.modeling.marks import attach_config_
from hf_lowrank.modeling.weight_precision import planned_precisions, quantize_weights_
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.quantization import Quantization
from hf_lowrank.report.sections import Sizes


def write_compressed(
    stream: BlockStream,
    factors: Mapping[str, Factors],
    plan: RankPlan,
    orders: Mapping[str, ChannelOrder],
    decided: LowRankConfig,
    folder: Path,
    progress: bool,
) -> Quantization | None:
    """Writes a plan's checkpoint; from now on the model is that one, and its blocks come from it.

    Weights that the config wants in fewer bits are quantized as they are written.

    Args:
        stream: The dense model; afterwards its modules are the compressed ones, on meta.
        factors: As in `factorize_`, as the next two.
        plan: Ranks and narrowed layers.
        orders: Channel orders.
        decided: Becomes the model's config.
        folder: Where the files go; those that are there are kept.
        progress: Whether to show progress.

    Returns:
        What the report says of quantized weights; None without such.

    Raises:
        StorageError: A file could not be written.
    """
    model: Any = stream.model
    replace_with_lowrank_(model, Layout(plan.ranks, plan.narrowed, plan.form))
    attach_config_(model, decided)
    precisions = decided_precisions(model, plan.ranks, decided) or {}
    size, matrices = weight_bytes(model, precisions), planned_precisions(model, plan.ranks, "int8")
    key = "-".join(filter(None, (plan_key(plan), decided.weights)))
    place = folder / f"written-{key}"
    reverts = not saved_names_are_lost(model)
    count = len(stream) + 1
    files = [place / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    processes = stream.processes
    todo = processes.decide([index for index in range(count) if not files[index].exists()])
    for index in track(processes.share(todo), "write" if progress else None, "files"):
        if index < len(stream):
            own = {n: each for n, each in precisions.items() if n.startswith(stream.prefix(index))}
            with stream.cut(factors, plan, orders), stream.block(index):
                quantize_weights_(model, own)
                _write(model, _state(stream, index), files[index], reverts)
        else:
            with stream.ends():
                _write(model, _state(stream, None), files[index], reverts)
    processes.wait()
    quantize_weights_(model, precisions, expect_)
    stream.read_from(CheckpointTensors(model, files, stream.tensors.device), place.name)
    assemble_(model)
    attach_config_(model, decided)  # again: what is quantized is read off the model
    model.save_pretrained = SavedFiles(model, files)
    if not precisions:
        return None
    sizes = Sizes(size, weight_bytes(model, precisions))
    return quantization_of(decided, precisions, sizes, len(matrices))


def _state(stream: BlockStream, index: int | None) -> dict[str, torch.Tensor]:
    """The tensors of a block that is in memory, or of all that is outside of the blocks."""
    if index is not None:
        block = stream.list[index]
        return {stream.prefix(index) + n: tensor for n, tensor in block.state_dict().items()}
    model: Any = stream.model
    state: dict[str, torch.Tensor] = model.state_dict()
    ends = {n: tensor for n, tensor in state.items() if not n.startswith(f"{stream.name}.")}
    return remove_tied_weights_from_state_dict(ends, model)


def _write(model: Any, state: dict[str, torch.Tensor], path: Path, reverts: bool) -> None:  # noqa: ANN401
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    if reverts:
        state = revert_weight_conversion(model, state)
    try:
        with atomic_file(path) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
    except OSError as error:
        raise StorageError(f"{path}: could not be written ({error.strerror or error}).") from error


class SavedFiles:
    """`model.save_pretrained` of a model whose tensors are written already.

    Args:
        model: The compressed model, on the meta device.
        files: Its safetensors files.
    """

    def __init__(self, model: nn.Module, files: list[Path]) -> None:
        self.model: Any = model
        self.files = files

    def __call__(self, save_directory: str | Path) -> None:
        """Writes what `save_pretrained` writes; tensors are linked where the disk can do that."""
        folder, model = Path(save_directory), self.model
        write_loading_code(folder)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        places: dict[str, str] = {}
        size = 0
        for path in self.files:
            try:
                os.link(path, folder / path.name)
            except OSError:  # another disk, or one without links
                shutil.copyfile(path, folder / path.name)
            size += path.stat().st_size
            places |= dict.fromkeys(header_shapes(path), path.name)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")

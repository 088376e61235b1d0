"""Marks on a model: its config says that it is compressed, and saving adds what loading needs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers import HfQuantizer

from hf_lowrank.format.bundle import loading_code
from hf_lowrank.format.forms.stored_form import form_of
from hf_lowrank.format.native_classes import REMOTE_MODULE, auto_map, foreign_entries
from hf_lowrank.format.rebuild import compressed_layers


def mark_as_lowrank_(model: nn.Module, quantizer: HfQuantizer) -> None:
    """Makes `model.save_pretrained` write a checkpoint that loads as low-rank.

    Sets `quantization_config` and `auto_map` on a config of the model's own and `hf_quantizer`,
    and wraps the instance's `save_pretrained` so that it also writes the loading code.
    """
    config = _own_config(model)
    config.quantization_config = quantizer.quantization_config
    config.auto_map = auto_map(config) | foreign_entries(config)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    # transformers refuses .half(), .float() and training on models flagged as quantized; factors
    # allow all three, int8 and int4 none.
    is_quantized = bool(getattr(quantizer.quantization_config, "quantized", None))
    model.is_quantized = is_quantized  # type: ignore[assignment]
    model.save_pretrained = _SavePretrained(model)  # type: ignore[assignment]


def _own_config(model: Any) -> Any:  # noqa: ANN401
    """A copy of the model's config, put in its place: another model may share the old one."""
    old, new = model.config, copy.copy(model.config)
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = new
    return new


def unmark_as_lowrank_(model: nn.Module) -> None:
    """Undoes `mark_as_lowrank_`, for a model whose layers are dense again."""
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "save_pretrained"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
        (model.config, "_is_quantized"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)
    own = foreign_entries(model.config)
    if own:
        model.config.auto_map = own  # type: ignore[union-attr]
    elif "auto_map" in vars(model.config):
        delattr(model.config, "auto_map")


def write_loading_code(folder: Path) -> None:
    """Writes the code that travels with a checkpoint into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{REMOTE_MODULE}.py").write_text(loading_code(), encoding="utf-8")


class _SavePretrained:
    """`model.save_pretrained`, and the loading code beside the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self, save_directory: str, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        if is_main_process:
            write_loading_code(Path(save_directory))
        if saved_names_are_lost(self.model):
            kwargs.setdefault("save_original_format", False)
        save = getattr(type(self.model), "save_pretrained")  # noqa: B009
        save(self.model, save_directory, is_main_process, *args, **kwargs)


def saved_names_are_lost(model: Any) -> bool:  # noqa: ANN401
    """Whether transformers, which saves some models under older names, could not read ours again.

    It joins layers, such as q, k and v, which can't be done with layers of different ranks, or it
    takes the name of a layer's factor for that of its weight. Such a model is saved under its
    modules' names.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ModuleNotFoundError:  # transformers 4 has one name for each tensor
        return False
    is_native = isinstance(model, transformers.PreTrainedModel)
    loading = get_model_conversion_mapping(model) if is_native else []
    joining = [each.reverse_transform() for each in loading if isinstance(each, WeightConverter)]
    renaming = [each for each in loading if not isinstance(each, WeightConverter)]
    saving = [each.reverse_transform() for each in reversed(renaming)]
    for name, layer in compressed_layers(model).items():
        keys = [f"{name}.{tensor}" for tensor in ("weight", *form_of(layer).tensors)]
        if any(each.rename_source_key(key)[1] is not None for key in keys for each in joining):
            return True
        if any(_renamed(_renamed(key, saving), renaming) != key for key in keys[1:]):
            return True
    return False


def _renamed(key: str, renamings: list[Any]) -> str:
    """A tensor's name after several renamings, one after the other."""
    for each in renamings:
        key = each.rename_source_key(key)[0]
    return key

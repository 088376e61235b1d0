"""Compressed layers in a model: found, and put where config.json says they were."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.forms.narrowed import NarrowedLinear
from hf_lowrank.format.forms.stored_form import CompressedLayer, listed_layers
from hf_lowrank.format.fused_experts import resize_experts_
from hf_lowrank.format.layout import Layout
from hf_lowrank.format.torchao_weights import expect_


def resolve_module_name(model: nn.Module, name: str) -> str | None:
    """Name of a module in `model` that was saved as `name`, maybe from another head class.

    `LlamaForCausalLM` saves `model.layers.0...`; `LlamaModel` calls the same layer `layers.0...`.
    Returns None where neither spelling exists.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def factorized_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The model's low-rank layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def narrowed_layers(model: nn.Module) -> dict[str, NarrowedLinear]:
    """The layers of feed-forwards that lost channels, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, NarrowedLinear)}


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The model's compressed layers of any form, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLayer)}


def replace_with_lowrank_(model: nn.Module, layout: Layout) -> None:
    """Replaces the listed layers by empty compressed ones, and experts by smaller ones, in place.

    Quantized weights are left as what a file holds of them, see `assemble_`.

    Args:
        model: A model, usually on the meta device.
        layout: What config.json says of the layers.

    Raises:
        ValueError: A name is missing from the model, is not a linear layer or a module of fused
            experts, or its entry is outside the layer's limits.
    """
    for saved_name, form, entry in listed_layers(layout):
        name = resolve_module_name(model, saved_name)
        if name is None:
            raise ValueError(
                f"config.json gives {saved_name} a {form.entry}, but {type(model).__name__} has no "
                "such layer; the config does not belong to this model."
            )
        layer = model.get_submodule(name)
        if not isinstance(layer, (nn.Linear, Conv1D)) or isinstance(layer, CompressedLayer):
            raise ValueError(
                f"{name}: only nn.Linear and Conv1D can be factorized, not {type(layer).__name__}."
            )
        try:
            new_layer = form.empty_layer(layer, entry)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, new_layer)
    for saved_name, left in layout.experts.items():
        name = resolve_module_name(model, saved_name)
        if name is None:
            raise ValueError(
                f"config.json says what is left of {saved_name}, but {type(model).__name__} has no "
                "such experts; the config does not belong to this model."
            )
        try:
            resize_experts_(model, name, left)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for saved_name, precision in layout.quantized.items():
        name = resolve_module_name(model, saved_name) or saved_name
        try:
            expect_(_linear(model, name), precision)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = model
    if not isinstance(module, nn.Linear):
        raise ValueError("config.json gives it a precision, but it is no linear layer.")
    return module

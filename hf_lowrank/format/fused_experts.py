"""Experts that transformers 5 fuses into 3-D parameters: found, made smaller, made whole again.

All experts of a layer keep the same number of channels, so that their tensors stay fused; which
ones may differ. An expert that is dropped takes its row of the router along.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lowrank.errors import TargetError
from hf_lowrank.format.layout import ExpertsLeft

# Of a module of experts that has lost some of its channels or experts: its dense size.
DENSE_SIZE = "lowrank_dense_size"
_WIDTHS = ("intermediate_dim", "intermediate_size")


@dataclass(frozen=True)
class ExpertsShape:
    """Sizes of the fused experts of a layer.

    Attributes:
        size: How many experts there are, and the inner channels of each.
        hidden: Length of their inputs and outputs.
        inputs: Rows that lead into each channel: 2 for gate and up, else 1.
        transposed: Whether the weights are stored as (experts, in, out).
    """

    size: ExpertsLeft
    hidden: int
    inputs: int
    transposed: bool

    @property
    def channel_cost(self) -> int:
        """Weights of one channel of one expert."""
        return (self.inputs + 1) * self.hidden

    def tensor_shapes(self, size: ExpertsLeft) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, biases included, of experts of another size."""
        count, rows, into = size.experts, self.inputs * size.width, self.into
        shapes = {into: (count, rows, self.hidden), "down_proj": (count, self.hidden, size.width)}
        if self.transposed:
            shapes = {name: (count, n, m) for name, (_, m, n) in shapes.items()}
        biases = {f"{into}_bias": (count, rows), "down_proj_bias": (count, self.hidden)}
        return {**shapes, **biases}

    @property
    def into(self) -> str:
        """Name of the parameter that leads into the channels."""
        return "gate_up_proj" if self.inputs == 2 else "up_proj"


def experts_shape(module: nn.Module) -> ExpertsShape | None:
    """The sizes of a module of fused experts, None where it is none."""
    known = module._parameters
    down = known.get("down_proj")
    for inputs, name in ((2, "gate_up_proj"), (1, "up_proj")):
        into = known.get(name)
        if into is None or down is None or (into.ndim, down.ndim) != (3, 3):
            continue
        for transposed in (False, True):
            count, rows, hidden = (into.mT if transposed else into).shape
            size = ExpertsLeft(count, rows // inputs)
            shape = ExpertsShape(size, hidden, inputs, transposed)
            expected = shape.tensor_shapes(size)
            given = {key: tuple(value.shape) for key, value in known.items() if value is not None}
            if all(expected.get(key) == value for key, value in given.items()):
                return shape
    return None


def find_router(model: nn.Module, name: str) -> str | None:
    """Name of the router whose rows are the experts of a module; None where it can't lose any.

    It stands beside them, everything that it holds has a row for each expert, and nothing else
    beside them has; groups of experts are chosen as such, so they stay.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    shape = experts_shape(model.get_submodule(name))
    if shape is None or [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]:
        return None
    for child, module in parent.named_children():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        rows = {tensor.shape[0] if tensor.ndim else 0 for tensor in held}
        counted = (getattr(module, "num_experts", None), *rows) == (shape.size.experts,) * 2
        groups = getattr(module, "num_group", None) or getattr(module, "n_group", None)
        if counted and not module._modules and hasattr(module, "top_k") and groups in (None, 1):
            return f"{name.rpartition('.')[0]}.{child}"
    return None


def with_tensors(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], **attributes: object
) -> nn.Module:
    """A copy of a module with other tensors in place of some of its own; it shares the rest.

    But for accelerate's hook, which calls the module that it was put on.
    """
    new = copy.copy(module)
    for key in ("forward", "_hf_hook", "_old_forward"):
        vars(new).pop(key, None)
    for key, value in vars(module).items():
        if isinstance(value, (dict, set)):
            new.__dict__[key] = copy.copy(value)
    for name, tensor in tensors.items():
        old = module._parameters.get(name)
        if old is None:
            new._buffers[name] = tensor
        else:
            new._parameters[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    for name, value in attributes.items():
        setattr(new, name, value)
    return new


def smaller_experts(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module with smaller tensors, its attributes and its dense size said accordingly."""
    shape = experts_shape(module)
    assert shape is not None  # whoever has tensors for it, has asked
    changed = with_tensors(module, tensors, num_experts=len(tensors["down_proj"]))
    width = getattr(experts_shape(changed), "size", shape.size).width
    for name in _WIDTHS:
        if getattr(module, name, None) == shape.size.width:
            setattr(changed, name, width)
    if not hasattr(changed, DENSE_SIZE):
        setattr(changed, DENSE_SIZE, (shape.size.experts, shape.size.width))
    return changed


def smaller_router(router: nn.Module, kept: torch.Tensor) -> nn.Module:
    """The router with the rows of the kept experts alone."""
    held = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    rows = {name: tensor.detach()[kept.to(tensor.device)] for name, tensor in held.items()}
    changed: dict[str, Any] = {"num_experts": len(kept)}
    changed |= {"out_features": len(kept)} if isinstance(router, nn.Linear) else {}
    return with_tensors(router, rows, **changed)


def small_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts that lost channels or experts, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, DENSE_SIZE)}


def resize_experts_(model: nn.Module, name: str, left: ExpertsLeft) -> None:
    """Puts experts of another size, and their router, in place; no values yet.

    Raises:
        ValueError: They are no fused experts, or the size is outside theirs.
    """
    module = model.get_submodule(name)
    shape = experts_shape(module)
    if shape is None:
        raise ValueError(
            f"{type(module).__name__} holds no fused experts as transformers 5 has them; install "
            "transformers 5.0 or newer."
        )
    size = shape.size
    if left.experts > size.experts or left.width > size.width:
        raise ValueError(f"{left} are not within the dense layer's, {size}.")
    router = find_router(model, name) if left.experts < size.experts else None
    if left.experts < size.experts:
        if router is None:
            raise ValueError(f"no router of {size.experts} rows stands beside it.")
        old: Any = model.get_submodule(router)
        if left.experts < old.top_k:
            raise ValueError(f"its router chooses {old.top_k} experts, and {left} are left.")
        model.set_submodule(router, smaller_router(old, torch.arange(left.experts)))
    shapes = shape.tensor_shapes(left)
    tensors = {
        key: torch.empty(shapes[key], dtype=value.dtype, device=value.device)
        for key, value in module.named_parameters(recurse=False)
    }
    model.set_submodule(name, smaller_experts(module, tensors))


@dataclass(frozen=True)
class ChannelView:
    """The experts' parameters by channel, whatever their layout.

    Attributes:
        into: Shape (experts, inputs, channels, hidden).
        bias: Shape (experts, inputs, channels), or None.
        out: Shape (experts, hidden, channels).
    """

    into: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor

    @classmethod
    def of(cls, module: nn.Module) -> ChannelView:
        """A view of the parameters of a module that `experts_shape` knows."""
        shape = experts_shape(module)
        assert shape is not None
        into, down = module._parameters[shape.into], module._parameters["down_proj"]
        bias = module._parameters.get(f"{shape.into}_bias")
        assert into is not None and down is not None  # noqa: PT018
        apart, held = bool(module.is_concatenated), (shape.inputs, shape.size.width)
        first, last = (w.detach().mT if shape.transposed else w.detach() for w in (into, down))
        biases = None if bias is None else _apart(bias.detach(), held, apart)
        return cls(_apart(first, held, apart), biases, last)

    def stored(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors as the module stores them, in its dtype; not the output biases."""
        shape = experts_shape(module)
        assert shape is not None
        apart, dtype = bool(module.is_concatenated), module._parameters["down_proj"].dtype  # type: ignore[union-attr]
        weights = {shape.into: _together(self.into, apart), "down_proj": self.out}
        if shape.transposed:
            weights = {name: weight.mT for name, weight in weights.items()}
        if self.bias is not None:
            weights[f"{shape.into}_bias"] = _together(self.bias, apart)
        return {name: weight.to(dtype).contiguous() for name, weight in weights.items()}


def _apart(rows: torch.Tensor, sizes: tuple[int, int], concatenated: bool) -> torch.Tensor:
    """Axis 1 as (inputs, channels): all gates first, or a gate and an up in turn."""
    rows = rows.unflatten(1, sizes if concatenated else sizes[::-1])
    return rows if concatenated else rows.swapdims(1, 2)


def _together(rows: torch.Tensor, concatenated: bool) -> torch.Tensor:
    return (rows if concatenated else rows.swapdims(1, 2)).flatten(1, 2)


@torch.no_grad()
def full_experts(name: str, module: nn.Module) -> nn.Module:
    """The experts at full width, zeros where channels are missing: they compute the same.

    Raises:
        TargetError: Experts were dropped; a router that still knew them would choose them.
    """
    experts, width = getattr(module, DENSE_SIZE)
    view = ChannelView.of(module)
    left = ExpertsLeft(view.out.shape[0], view.out.shape[2])
    if left.experts < experts:
        raise TargetError(
            f"{name}: {left.experts} of {experts} experts are left, and no dense model with all of "
            "them computes the same; keep this model in its compressed form."
        )
    missing = (0, width - left.width)
    pad = nn.functional.pad
    bias = None if view.bias is None else pad(view.bias, missing)
    full = ChannelView(pad(view.into, (0, 0, *missing)), bias, pad(view.out, missing))
    whole = smaller_experts(module, full.stored(module))
    delattr(whole, DENSE_SIZE)
    return whole

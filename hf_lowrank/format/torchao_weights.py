"""Weights in int8 or int4: torchao's tensors in memory, plain tensors in a file.

How numbers are quantized and multiplied is torchao's. In memory a quantized layer's `weight` is an
`Int8Tensor` or an `IntxUnpackedToInt8Tensor`, both of which run on any device without kernels of
torchao's own. In a `state_dict`, and so in a file, the two tensors that it is made of stand in its
place under the names that torchao gives them, int4 packed two to a byte.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import nn

from hf_lowrank.errors import CheckpointError, ConfigError
from hf_lowrank.format.layout import Precision
from hf_lowrank.format.weight_stand_in import WeightStandIn

NUMBERS, SCALE = "_weight_qdata", "_weight_scale"
_OLDEST = "0.18"
_INT4: Any = getattr(torch, "int4", None)  # a torch too old for torchao has none


def check_torchao(what: str) -> None:
    """Refuses where torchao is missing or too old.

    Args:
        what: What needs it, the subject of the message.

    Raises:
        ConfigError: With what to install.
    """
    found = importlib.util.find_spec("torchao") is not None
    if not (found and hasattr(_torchao(), "Int8Tensor")):
        raise ConfigError(
            f"{what} needs torchao {_OLDEST} or newer: pip install 'torchao>={_OLDEST}'."
        )


def _torchao() -> Any:  # noqa: ANN401
    # An import statement would make transformers ask for torchao wherever this file is copied to.
    return importlib.import_module("torchao.quantization")


def is_quantized(weight: object) -> bool:
    """Whether a weight is one of torchao's tensors."""
    return hasattr(weight, "qdata")


def precision_of(weight: Any) -> Precision:  # noqa: ANN401
    """Precision of a quantized weight."""
    is_int4 = getattr(weight, "target_dtype", torch.int8) == _INT4
    return Precision(4 if is_int4 else 8, tuple(weight.block_size))


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weight is quantized, by name."""
    return {n: m for n, m in model.named_modules() if is_quantized(getattr(m, "weight", None))}


def quantized_settings(model: nn.Module) -> dict[str, dict[str, Any]] | None:
    """What config.json says of a model's quantized weights."""
    modules = quantized_modules(model)
    return {name: precision_of(m.weight).to_json() for name, m in modules.items()} or None


def stored_shapes(shape: tuple[int, int], precision: Precision) -> dict[str, tuple[int, int]]:
    """Shapes of what a file holds of a weight of shape (m, n), by the end of its name.

    Raises:
        ValueError: The weight does not divide into such blocks.
    """
    (m, n), (rows, columns) = shape, precision.block
    if m % rows or n % columns:
        raise ValueError(f"a weight of shape {[m, n]} has no blocks of shape {[rows, columns]}.")
    numbers = n if precision.bits == 8 else math.ceil(n / 2)
    return {NUMBERS: (m, numbers), SCALE: (m // rows, n // columns)}


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in a file."""
    if not is_quantized(tensor):
        return tensor.numel() * tensor.element_size()
    m, n = tensor.shape
    shapes = stored_shapes((m, n), precision_of(tensor))
    scale: Any = getattr(tensor, "scale")  # noqa: B009
    return math.prod(shapes[NUMBERS]) + math.prod(shapes[SCALE]) * int(scale.element_size())


@torch.no_grad()
def quantize_(layer: nn.Linear, precision: Precision) -> None:
    """Quantizes a layer's weight, in place: symmetric, scales in the weight's dtype.

    int8 takes the largest number of a row as its scale, int4 the scale of each block with the
    least square error, by torchao's half-quadratic quantization.
    """
    weight, torchao = layer.weight.detach(), _torchao()
    (m, n), (rows, columns) = weight.shape, precision.block
    if precision.bits == 8:
        shares = torchao.PerTensor() if (rows, columns) == (m, n) else torchao.PerRow()
        scale = torchao.Int8Tensor.from_hp(weight, shares).scale.to(weight.dtype)
        numbers = torchao.Int8Tensor.from_hp(weight, shares, scale=scale).qdata
    else:
        intx = importlib.import_module("torchao.quantization.quantize_.workflows")
        # torchao's algorithm goes along rows.
        lying = weight if rows == 1 else weight.T.contiguous()
        found = torchao.IntxUnpackedToInt8Tensor.from_hp(
            lying,
            (1, rows * columns),
            _INT4,
            intx_choose_qparams_algorithm=intx.IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
        )
        numbers, scale = found.qdata, found.scale
        if rows > 1:
            numbers, scale = numbers.T.contiguous(), scale.T.contiguous()
    _put(layer, _joined(numbers, scale.reshape(m // rows, n // columns), precision))


def dequantized(numbers: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The weight of shape (m, n) that a file's two tensors stand for, without torchao.

    Args:
        numbers: int8 of shape (m, n), or uint8 of shape (m, ceil(n / 2)) for int4.
        scale: One number for each block, in the weight's dtype.
        columns: n.
    """
    whole = numbers if numbers.dtype == torch.int8 else _unpacked(numbers, columns)
    rows, across = whole.shape[0] // scale.shape[0], columns // scale.shape[1]
    return whole * scale.repeat_interleave(rows, dim=0).repeat_interleave(across, dim=1)


def expect_(layer: nn.Linear, precision: Precision) -> None:
    """Makes room for what a file holds of the layer's weight, in the weight's place.

    Raises:
        ValueError: The weight does not divide into such blocks.
    """
    weight = layer.weight
    shapes = stored_shapes((layer.out_features, layer.in_features), precision)
    dtypes = {NUMBERS: torch.int8 if precision.bits == 8 else torch.uint8, SCALE: weight.dtype}
    del layer.weight
    # Modeling code asks layers for their weight's dtype, and draws those of other layers' children.
    empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    vars(layer)["weight"] = empty.as_subclass(WeightStandIn)
    for part, shape in shapes.items():
        room = torch.empty(shape, dtype=dtypes[part], device=weight.device)
        layer.register_buffer(part, room)


def assemble_(model: nn.Module) -> None:
    """Makes quantized weights of what a file held, in place; `expect_` had made room for it."""
    for layer in model.modules():
        if NUMBERS in layer._buffers and isinstance(layer, nn.Linear):
            parts = {part: layer.get_buffer(part) for part in (NUMBERS, SCALE)}
            for part in parts:
                delattr(layer, part)
            _put(layer, _read(layer, parts))


def _read(layer: nn.Linear, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """A layer's weight from its two tensors, whose types and shapes tell the precision.

    Raises:
        CheckpointError: They are of types that no quantized weight has.
    """
    numbers, scale = parts[NUMBERS], parts[SCALE]
    if numbers.dtype not in (torch.int8, torch.uint8) or not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"a quantized weight of shape {[layer.out_features, layer.in_features]} is stored as "
            f"{numbers.dtype} with scales in {scale.dtype}; numbers are int8, or uint8 for two of "
            "4 bits, and scales are floats."
        )
    block = (layer.out_features // scale.shape[0], layer.in_features // scale.shape[1])
    if numbers.dtype == torch.int8:
        return _joined(numbers, scale, Precision(8, block))
    return _joined(_unpacked(numbers, layer.in_features), scale, Precision(4, block))


def _joined(numbers: torch.Tensor, scale: torch.Tensor, precision: Precision) -> torch.Tensor:
    """The tensor of torchao that is made of int8 numbers and their scales."""
    torchao = _torchao()
    # `Int8Tensor` multiplies before it scales, which overflows in fp16.
    if precision.bits == 8 and scale.dtype != torch.float16:
        block = list(precision.block)
        joined: torch.Tensor = torchao.Int8Tensor(numbers, scale, block, scale.dtype)
    else:
        zeros = torch.zeros_like(scale, dtype=torch.int8)
        kind = torch.int8 if precision.bits == 8 else _INT4
        joined = torchao.IntxUnpackedToInt8Tensor(
            numbers, scale, zeros, kind, precision.block, scale.dtype, None
        )
    return joined


def _put(layer: nn.Linear, weight: torch.Tensor) -> None:
    """Gives a layer a quantized weight, which its `state_dict` shows as it is stored."""
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_state_dict_post_hook(_split)
    layer.register_load_state_dict_pre_hook(_join)


def _split(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    weight = state.pop(f"{prefix}weight")
    is_int8 = precision_of(weight).bits == 8
    state[prefix + NUMBERS] = weight.qdata if is_int8 else _packed(weight.qdata)
    state[prefix + SCALE] = weight.scale


def _join(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    names = {part: prefix + part for part in (NUMBERS, SCALE)}
    if isinstance(layer, nn.Linear) and all(name in state for name in names.values()):
        parts = {part: state.pop(name) for part, name in names.items()}
        state[f"{prefix}weight"] = _read(layer, parts)


def _packed(numbers: torch.Tensor) -> torch.Tensor:
    """Two numbers from -8 to 7 to a byte along each row, the first in the lower half."""
    halves = nn.functional.pad(numbers, (0, numbers.shape[1] % 2)).view(torch.uint8) & 15
    return halves[:, ::2] | halves[:, 1::2] << 4


def _unpacked(stored: torch.Tensor, columns: int) -> torch.Tensor:
    halves = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)[:, :columns]
    return ((halves ^ 8).to(torch.int8) - 8).contiguous()

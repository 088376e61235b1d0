"""Weights of targeted layers in int8 or int4, after the cut and its recovery.

int8 has a scale for each row, int4 one for each block of about 32 numbers. With "int4" second
factors and both matrices of compact layers stay int8: on SmolLM2-135M most of what int4 costs in
low-rank layers came from these. Or each matrix has bits of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.forms.quantized import QuantizedLinear
from hf_lowrank.format.forms.stored_form import CompressedLayer
from hf_lowrank.format.layout import Precision
from hf_lowrank.format.torchao_weights import (
    check_torchao,
    precision_of,
    quantize_,
    quantized_modules,
    stored_shapes,
)

# "int8", "int4", None for weights as they are, or bits by the name of a matrix's module.
Weights = str | Mapping[str, int] | None

GROUP = 32  # numbers that share a scale in int4
_BITS = {"int8": 8, "int4": 4}
_ROWS = 64
_TINY = 1e-30
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_quantizable(targets: Mapping[str, nn.Module], weights: str | None) -> None:
    """Refuses what can't be quantized, before any long work.

    Args:
        targets: The targeted layers by name.
        weights: "int8", "int4", or None for weights as they are.

    Raises:
        ConfigError: torchao is missing, or a weight has another dtype than it takes.
    """
    if weights is None:
        return
    check_torchao(f"weights={weights!r}")
    for name, layer in targets.items():
        dtype = linear_weight(layer).dtype
        if dtype not in _DTYPES:
            raise ConfigError(
                f"{name}: weights={weights!r} needs a model in float32, bfloat16 or float16, got "
                f"{str(dtype).removeprefix('torch.')}."
            )


def refuse_quantized(model: nn.Module) -> None:
    """Refuses to train a model whose weights are quantized.

    Raises:
        TargetError: With the first of them.
    """
    for name, module in quantized_modules(model).items():
        bits = precision_of(module.weight).bits
        raise TargetError(
            f"{name}: its weight is int{bits}, which can't be trained; train before it is "
            "quantized, put a LoRA adapter on it (peft), or merge the model (hf_lowrank.merge)."
        )


def planned_precisions(
    model: nn.Module, names: Iterable[str], weights: Weights
) -> dict[str, Precision]:
    """Precision of the quantized matrices of a compressed model, by their modules' names.

    Args:
        model: The model after the cut.
        names: Its targeted layers, also those that stayed dense.
        weights: Their type, or types.
    """
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        form = layer.form if isinstance(layer, CompressedLayer) else "dense"
        children = layer.named_children() if form != "dense" else ()
        factors = {f"{name}.{child}": each for child, each in children}
        for full, each in (factors or {name: layer}).items():
            rows, columns = linear_weight(each).shape
            bits = bits_of(form, full, weights)
            if bits is not None:
                found[full] = Precision(bits, block_of((rows, columns), bits))
    return found


def bits_of(form: str, module: str, weights: Weights) -> int | None:
    """Bits of a matrix, None for one that stays as it is.

    Args:
        form: Stored form of its layer.
        module: Name of the module whose weight it is.
        weights: Type, or types, of all.
    """
    if not isinstance(weights, str):
        return None if weights is None else weights.get(module)
    return 8 if form == "compact" or module.endswith("lowrank_B") else _BITS[weights]


def matrix_bytes(shape: tuple[int, int], bits: int | None, element_size: int) -> int:
    """Bytes of a matrix in a file, with its scales.

    Args:
        shape: (m, n).
        bits: 4, 8, or None for a weight as it is.
        element_size: Bytes of a number of the model's dtype, which scales have, too.
    """
    if bits is None:
        return shape[0] * shape[1] * element_size
    numbers, scales = stored_shapes(shape, Precision(bits, block_of(shape, bits))).values()
    return math.prod(numbers) + math.prod(scales) * element_size


def block_of(shape: tuple[int, int], bits: int) -> tuple[int, int]:
    """(rows, columns) of the numbers of a matrix that share a scale.

    torchao takes whole blocks only, so in int4 it is the divisor of a side that is nearest to 32:
    of the row's length, or of the column's where that has a better one.

    Args:
        shape: (m, n) of the matrix.
        bits: 4 or 8.
    """
    rows, columns = shape
    if bits == 8:  # torchao finds no scale for a row of one number
        return (1, columns) if columns > 1 else (rows, 1)
    lying, standing = nearest_divisor(columns), nearest_divisor(rows)
    (off_lying, along_row), (off_standing, along_column) = (
        (abs(math.log(size / GROUP)), size) for size in (lying, standing)
    )
    return (along_column, 1) if off_standing < off_lying else (1, along_row)


@functools.cache
def nearest_divisor(size: int) -> int:
    """The divisor of a size nearest to 32 by its ratio."""
    divisors = [each for each in range(1, size + 1) if size % each == 0]
    return min(divisors, key=lambda each: abs(math.log(each / GROUP)))


def rounding_share(weight: torch.Tensor, bits: int) -> float:
    """Mean square of a weight's rounding errors over that of the weight, from some of its rows.

    Args:
        weight: Shape (m, n).
        bits: 4 or 8.
    """
    rows = weight.detach()[:: max(1, len(weight) // _ROWS)][:_ROWS].clone()
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta", dtype=rows.dtype)
    layer.weight = nn.Parameter(rows, requires_grad=False)
    quantize_(layer, Precision(bits, block_of((rows.shape[0], rows.shape[1]), bits)))
    error = cast(Any, layer.weight).dequantize() - rows
    return float(error.double().square().sum() / rows.double().square().sum().clamp_min(_TINY))


@torch.no_grad()
def quantize_weights_(
    model: nn.Module,
    precisions: Mapping[str, Precision],
    change: Callable[[nn.Linear, Precision], None] = quantize_,
) -> None:
    """Quantizes the named matrices, in place; dense layers become `QuantizedLinear`.

    Args:
        model: The model after the cut.
        precisions: Precision by the name of a factor, a narrowed or a dense layer.
        change: What is done to each; `expect_` makes room for what a file holds instead.
    """
    for name, precision in precisions.items():
        layer = model.get_submodule(name)
        is_factor = isinstance(model.get_submodule(name.rpartition(".")[0]), CompressedLayer)
        if not is_factor and not isinstance(layer, CompressedLayer):
            layer = _quantized_linear(layer)
            model.set_submodule(name, layer)
        assert isinstance(layer, nn.Linear)
        change(layer, precision)


def _quantized_linear(layer: nn.Module) -> QuantizedLinear:
    """A layer with the weight, bias and mode of a dense one; its weight is not quantized yet."""
    weight, bias = linear_weight(layer), layer.bias
    with torch.device("meta"):  # no random start, so the random state is left alone
        copy = QuantizedLinear(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            conv1d=isinstance(layer, Conv1D),
            dtype=weight.dtype,
        )
    copy.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    copy.bias = bias  # type: ignore[assignment]
    return copy.train(layer.training)

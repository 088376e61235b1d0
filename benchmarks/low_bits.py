"""Weights of 2 to 4 bits by HQQ (Badri and Shaji, 2023), alone or with a low-rank correction.

The numbers are those of HQQ's own solver as torchao has it, groups of 64 along a row, each with a
scale and a zero point. A correction approximates what rounding lost, `W ~ Q(W) + B A`, by the
truncated SVD of `W - Q(W)` in the `kfac` metric; A and B are int8.

In a file the numbers are packed to their bits. In memory they take a byte each, and a product
multiplies with the numbers that they stand for, as torchao's types without a kernel do.
"""

from __future__ import annotations

import heapq
import importlib
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.options import Run
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.spectrum import Factors, Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.format.layout import Precision
from hf_lowrank.format.torchao_weights import check_torchao, expect_, quantize_
from hf_lowrank.modeling.surgery import swapped
from hf_lowrank.modeling.weight_precision import block_of

GROUP = 64  # HQQ's own default


class LowBitLinear(nn.Module):
    """`x -> x Q^T + (x A^T) B^T + b` with Q in few bits; empty until it is filled or loaded.

    Args:
        shape: (out_features, in_features).
        bits: Of each number of Q.
        rank: Of the correction, 0 for none.
        bias: Whether there is one.
        dtype: Of scales, zero points and the bias.
    """

    def __init__(
        self, shape: tuple[int, int], bits: int, rank: int, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        (rows, columns), self.bits = shape, bits
        groups = (rows, columns // math.gcd(columns, GROUP))
        self.register_buffer("numbers", torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(groups, dtype=dtype))
        self.register_buffer("zero", torch.zeros(groups, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype)) if bias else None
        self.lowrank_A = self.lowrank_B = None
        if rank:
            self.lowrank_A = nn.Linear(columns, rank, bias=False, dtype=dtype)
            self.lowrank_B = nn.Linear(rank, rows, bias=False, dtype=dtype)

    @property
    def rank(self) -> int:
        """Of the correction, 0 for none."""
        return 0 if self.lowrank_A is None else self.lowrank_A.out_features

    @torch.no_grad()
    def fill_(self, weight: torch.Tensor, factors: Factors | None) -> None:
        """Rounds a weight of shape (m, n), and takes the first components of its correction."""
        scale, zero = self.get_buffer("scale"), self.get_buffer("zero")
        numbers, found, zeros = _hqq(weight, self.bits)
        self.get_buffer("numbers").copy_(numbers)
        scale.copy_(found)
        zero.copy_(zeros)
        if self.lowrank_A is not None and self.lowrank_B is not None and factors is not None:
            factor_a, factor_b = factors.balanced(self.rank)
            for layer, values in ((self.lowrank_A, factor_a), (self.lowrank_B, factor_b)):
                layer.weight.copy_(values)
                quantize_(layer, _int8(layer))

    def expect_factors_(self) -> None:
        """Makes room for the two factors as they lie in a file."""
        for layer in (self.lowrank_A, self.lowrank_B):
            if layer is not None:
                expect_(layer, _int8(layer))

    def rounded(self) -> torch.Tensor:
        """Q, shape (m, n), in the dtype of the scales."""
        numbers, scale = self.get_buffer("numbers"), self.get_buffer("scale")
        values: torch.Tensor = numbers.to(scale.dtype).unflatten(1, (scale.shape[1], -1))
        values.sub_(self.get_buffer("zero")[..., None]).mul_(scale[..., None])
        return values.flatten(1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The product."""
        result = F.linear(inputs, self.rounded(), self.bias)
        if self.lowrank_A is not None and self.lowrank_B is not None:
            result = result + self.lowrank_B(self.lowrank_A(inputs))
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}numbers"] = packed(self.get_buffer("numbers"), self.bits)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:  # noqa: ANN401
        name, shape = f"{prefix}numbers", self.get_buffer("numbers").shape
        if name in state:
            state[name] = unpacked(state[name], self.bits, shape.numel()).view(shape)
        super()._load_from_state_dict(state, prefix, *args)


class _Seen(nn.Linear):
    """What rounding lost of a layer, as a layer's weight; computes what the layer does.

    So moments are those of the dense model, and images those under this weight.
    """

    def __init__(self, layer: nn.Module, lost: torch.Tensor) -> None:
        rows, columns = lost.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.weight = nn.Parameter(lost)
        self.layer = layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.layer(inputs))


def low_bit_layer(
    layer: nn.Module, bits: int, dtype: torch.dtype, rank: int = 0, factors: Factors | None = None
) -> LowBitLinear:
    """A dense layer in few bits.

    Args:
        layer: An `nn.Linear` or `Conv1D`.
        bits: Of each number.
        dtype: Of scales, zero points and the bias.
        rank: Of the correction, 0 for none.
        factors: Of what rounding lost, with a rank.
    """
    bias = cast("torch.Tensor | None", layer.bias)
    result = LowBitLinear(linear_shape(layer), bits, rank, bias=bias is not None, dtype=dtype)
    with torch.no_grad():
        if bias is not None and result.bias is not None:
            result.bias.copy_(bias)
    result.fill_(linear_weight(layer), factors)
    return result


def analyze_lost(
    model: nn.Module, targets: Mapping[str, nn.Module], bits: int, dtype: torch.dtype, run: Run
) -> Analysis:
    """Spectra and factors of what rounding loses, in the `kfac` metric of the dense model.

    Args:
        model: The dense model.
        targets: Its layers to be rounded, by name.
        bits: Of each number.
        dtype: Of scales and zero points.
        run: Calibration text, and a `cache_dir`.
    """
    seen: dict[str, nn.Module] = {}
    for name, layer in targets.items():
        weight = linear_weight(layer)
        rounded = low_bit_layer(layer, bits, dtype).rounded().to(weight.dtype)
        seen[name] = _Seen(layer, weight - rounded)
    config = LowRankConfig(param_ratio=1.0, channels=False, measured_prices=False)
    with swapped(model, seen):
        return analyze(model, seen, config, run)


def correction_ranks(spectra: Mapping[str, Spectrum], extra: float) -> dict[str, int]:
    """Ranks of corrections that lower the predicted loss most for so many numbers.

    A component costs m + n numbers wherever it is, so components are taken in the order of their
    prices by number.

    Args:
        spectra: Of what rounding lost, by layer.
        extra: Numbers of all factors as a share of the layers' numbers.
    """
    shapes = {name: spectrum.shape for name, spectrum in spectra.items()}
    left = extra * sum(m * n for m, n in shapes.values())
    ranks = dict.fromkeys(shapes, 0)
    prices = {name: s.price.tolist() for name, s in spectra.items() if s.price is not None}
    queue = [(-each[0] / sum(shapes[name]), name) for name, each in prices.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        cost = sum(shapes[name])
        if cost > left:
            continue
        left -= cost
        ranks[name] += 1
        if ranks[name] < len(prices[name]):
            heapq.heappush(queue, (-prices[name][ranks[name]] / cost, name))
    return ranks


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers below 2^bits as bytes, uint8 of shape (ceil(count * bits / 8),)."""
    places = torch.arange(bits, dtype=torch.uint8)
    ones = (numbers.flatten()[:, None] >> places & 1).flatten()
    ones = F.pad(ones, (0, -len(ones) % 8)).view(-1, 8)
    return (ones << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpacked(stored: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The numbers that `packed` made bytes of, uint8 of shape (count,)."""
    ones = (stored[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
    ones = ones[: count * bits].view(count, bits)
    return (ones << torch.arange(bits, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _int8(layer: nn.Linear) -> Precision:
    return Precision(8, block_of((layer.out_features, layer.in_features), 8))


def _hqq(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of shape (m, n), scales and zero points of shape (m, groups).

    Raises:
        ConfigError: torchao has no such solver.
    """
    check_torchao("HQQ")
    solver = getattr(
        importlib.import_module("torchao.quantization.quant_primitives"),
        "_choose_qparams_and_quantize_affine_hqq",
        None,
    )
    if solver is None:
        raise ConfigError("HQQ needs a torchao that has its solver: pip install torchao==0.18.0.")
    numbers, scale, zero, _ = solver(
        weight.contiguous(),
        nbits=bits,
        group_size=math.gcd(weight.shape[1], GROUP),
        compute_dtype=torch.float32,
        device="cpu",
        raw_output=True,
    )
    return numbers, scale, zero

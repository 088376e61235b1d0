"""A matrix of rank k in its k (m + n - k) free numbers: pivots, and all else as their combination.

With k pivot columns `Q = W[:, p]` the others are `W[:, rest] = Q T`: `W x = Q (x[p] + T x[rest])`.
With k pivot rows `P = W[p]` the others are `W[rest] = C P`. PIFA (ICML 2025, arXiv 2501.19090)
stores rows. Here the pivots lie on the smaller side: that side's vectors have to be put in order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.forms.factors import FactorsForm, LowRankLinear, check_rank
from hf_lowrank.format.forms.stored_form import register


class CompactLinear(LowRankLinear):
    """A linear layer whose weight has rank k, in k (m + n - k) numbers.

    For `m >= n`, with the inputs in `lowrank_order`, k pivots p and then the rest:
    `y = B (x[p] + A x[rest]) + bias`. For `m < n`: `z = A x`, and the outputs are those of z and
    B z, each taken from its place in `lowrank_order`, plus bias.

    Args:
        in_features: Size n of the input's last axis.
        out_features: Size m of the output's last axis.
        rank: k, `1 <= k < min(m, n)`.
        bias: Whether there is a bias of shape (m,).
        conv1d: Whether the layer stands in for a transformers `Conv1D`.
        device: Device of the new parameters.
        dtype: Data type of the new parameters.

    Attributes:
        lowrank_A: `nn.Linear` with a weight of shape (k, n - k), or (k, n) if m < n.
        lowrank_B: `nn.Linear` with a weight of shape (m, k), or (m - k, k) if m < n.
        lowrank_order: Buffer of shape (min(m, n),), int32: the inputs in the order in which they
            are read, or for each output its place in (z, B z).
        lowrank_bias: Parameter of shape (m,) if m < n and there is a bias, else None.

    Raises:
        ValueError: The rank is outside `1..min(m, n) - 1`.
    """

    lowrank_order: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(rank, (out_features, in_features), below=1)
        by_inputs = out_features >= in_features
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            in_features, out_features, rank, bias and by_inputs, conv1d=conv1d, **options
        )
        own_bias = torch.zeros(out_features, **options) if bias and not by_inputs else None
        self.lowrank_bias = None if own_bias is None else nn.Parameter(own_bias)
        order = torch.arange(min(in_features, out_features), dtype=torch.int32, device=device)
        self.register_buffer("lowrank_order", order)

    @staticmethod
    def child_shapes(shape: tuple[int, int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the weights of `lowrank_A` and `lowrank_B` for a layer of shape (m, n)."""
        rows, columns = shape
        if rows >= columns:
            return (rank, columns - rank), (rows, rank)
        return (rank, columns), (rows - rank, rank)

    @property
    def by_inputs(self) -> bool:
        """Whether the pivots are columns, as with no more inputs than outputs; else rows."""
        return self.out_features >= self.in_features

    @property
    def form(self) -> str:
        """Always "compact"."""
        return "compact"

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of shape (m,), or None."""
        return self.lowrank_B.bias if self.by_inputs else self.lowrank_bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the layer to an input of shape (..., n); returns shape (..., m)."""
        order, rank = self.lowrank_order, self.rank
        output: torch.Tensor
        if self.by_inputs:
            pivots = hidden_states.index_select(-1, order[:rank])
            rest = self.lowrank_A(hidden_states.index_select(-1, order[rank:]))
            output = self.lowrank_B(pivots + rest)
            return output
        pivots = self.lowrank_A(hidden_states)
        output = torch.cat((pivots, self.lowrank_B(pivots)), dim=-1).index_select(-1, order)
        return output if self.lowrank_bias is None else output + self.lowrank_bias

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two thin factors whose product is the weight, in fp32 or the stored factors' own fp64.

        Returns:
            Shapes (m, k) and (k, n).
        """
        return with_units(*super().factors(), self.lowrank_order, self.by_inputs)

    def check_order(self, name: str) -> None:
        """Refuses an order that is none.

        Raises:
            CheckpointError: `lowrank_order` names a place twice or one that does not exist.
        """
        check_order(name, self.lowrank_order)


def check_order(name: str, order: torch.Tensor) -> None:
    """Refuses an order that is no permutation.

    Raises:
        CheckpointError: With the layer's name.
    """
    places = torch.arange(len(order), device=order.device)
    if not torch.equal(order.long().sort().values, places):
        raise CheckpointError(
            f"{name}.lowrank_order must hold each of 0 to {len(places) - 1} once; the "
            "checkpoint is damaged."
        )


def with_units(
    left: torch.Tensor, right: torch.Tensor, order: torch.Tensor, by_inputs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two thin factors, of shapes (m, k) and (k, n), of what a `CompactLinear` holds.

    Args:
        left: Weight of its `lowrank_B`.
        right: Weight of its `lowrank_A`.
        order: Its `lowrank_order`.
        by_inputs: Whether the pivots are columns.
    """
    unit, order = torch.eye(len(right), dtype=left.dtype, device=left.device), order.long()
    if by_inputs:
        return left, torch.cat((unit, right), dim=1)[:, order.argsort()]
    return torch.cat((unit, left))[order], right


@register
class CompactForm(FactorsForm):
    """A `CompactLinear` of rank k."""

    name = "compact"
    tensors: ClassVar[tuple[str, ...]] = (*FactorsForm.tensors, "lowrank_order")

    def shapes(self, shape: tuple[int, int], entry: int) -> list[tuple[int, ...]]:
        """Those of the children and (min(m, n),) for a rank k."""
        return [*CompactLinear.child_shapes(shape, entry), (min(shape),)]

    def build(self, shape: tuple[int, int], rank: int, **options: Any) -> LowRankLinear:
        """See `RankedForm`."""
        return CompactLinear(shape[1], shape[0], rank, **options)

"""Two thin factors in place of a weight: `W = B A`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from hf_lowrank.format.dense_linear import dense_layer, plain
from hf_lowrank.format.forms.stored_form import CompressedLayer, RankedForm, register
from hf_lowrank.format.weight_stand_in import WeightStandIn


class LowRankLinear(CompressedLayer):
    """A linear layer whose weight is a product of thin factors.

    Inference form: `y = B (A x) + bias`. Training form: `y = B (s * (A x)) + bias`, where the
    columns of `B` and the rows of `A` are kept near orthonormal by a penalty and `s` is the
    trainable spectrum, so `B`, `s`, `A` are the `U`, `s`, `V` of SVD training.

    Args:
        in_features: Size n of the input's last axis.
        out_features: Size m of the output's last axis.
        rank: Inner size k, `1 <= k <= min(m, n)`.
        bias: Whether there is a bias of shape (m,).
        form: "factors" for the inference form, "usv" for the training form.
        conv1d: Whether the layer stands in for a transformers `Conv1D`, whose weight is stored
            transposed; only `to_dense` needs to know.
        device: Device of the new parameters.
        dtype: Data type of the new parameters.

    Attributes:
        lowrank_A: `nn.Linear` with a weight of shape (k, n).
        lowrank_B: `nn.Linear` with a weight of shape (m, k) and the bias.
        lowrank_s: Parameter of shape (k,) in the training form, else None.

    Raises:
        ValueError: The rank is outside `1..min(m, n)`, or the form is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        form: str = "factors",
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, (out_features, in_features))
        if form not in ("factors", "usv"):
            raise ValueError(f"form must be one of factors, usv, got {form!r}.")
        self.in_features = in_features
        self.out_features = out_features
        self.conv1d = conv1d
        shape_a, shape_b = self.child_shapes((out_features, in_features), rank)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lowrank_A = nn.Linear(shape_a[1], shape_a[0], bias=False, **options)
        self.lowrank_B = nn.Linear(shape_b[1], shape_b[0], bias=bias, **options)
        spectrum = torch.ones(rank, device=device, dtype=dtype) if form == "usv" else None
        self.lowrank_s = nn.Parameter(spectrum) if spectrum is not None else None

    @staticmethod
    def child_shapes(shape: tuple[int, int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the weights of `lowrank_A` and `lowrank_B` for a layer of shape (m, n)."""
        return (rank, shape[1]), (shape[0], rank)

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return self.lowrank_A.out_features

    @property
    def form(self) -> str:
        """Either "factors" (inference) or "usv" (training)."""
        return "factors" if self.lowrank_s is None else "usv"

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of shape (m,), or None."""
        return self.lowrank_B.bias

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the dense weight, without its values: a tensor on the meta device.

        Modeling code asks a layer for `weight.dtype` or initialises `weight` in place; both work
        on this stand-in at no cost, all else raises. The values come from `dense_weight()`.
        """
        shape, dtype = (self.out_features, self.in_features), self.lowrank_B.weight.dtype
        return torch.empty(shape, dtype=dtype, device="meta").as_subclass(WeightStandIn)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the layer to an input of shape (..., n); returns shape (..., m)."""
        inner = self.lowrank_A(hidden_states)
        if self.lowrank_s is not None:
            inner = inner * self.lowrank_s
        output: torch.Tensor = self.lowrank_B(inner)
        return output

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two thin factors whose product is the weight, in fp32 or the stored factors' own fp64.

        Returns:
            Shapes (m, k) and (k, n).
        """
        dtype = torch.promote_types(self.lowrank_A.weight.dtype, torch.float32)
        left, right = (plain(f.weight).to(dtype) for f in (self.lowrank_B, self.lowrank_A))
        if self.lowrank_s is not None:
            left = left * self.lowrank_s.to(dtype)
        return left, right

    def dense_weight(self) -> torch.Tensor:
        """The product of the factors, shape (m, n), in their dtype; see `factors`."""
        left, right = self.factors()
        return left @ right

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The dense layer with the same output: `nn.Linear`, or `Conv1D` if it came from one."""
        weight = self.dense_weight().to(self.lowrank_B.weight.dtype)
        return dense_layer(weight, self.bias, self.conv1d)

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, form={self.form}"
        )


def check_rank(rank: int, shape: tuple[int, int], below: int = 0) -> None:
    """Refuses a rank outside `1..min(shape) - below`.

    Raises:
        ValueError: With the limits.
    """
    if not 1 <= rank <= min(shape) - below:
        limit = f"min({shape[0]}, {shape[1]})" + f" - {below}" * bool(below)
        raise ValueError(
            f"rank {rank} is outside 1..{limit}; lower the rank or keep the layer dense."
        )


@register
class FactorsForm(RankedForm):
    """A `LowRankLinear` of rank k: A of shape (k, n), B of shape (m, k)."""

    name = "factors"
    tensors: ClassVar[tuple[str, ...]] = ("lowrank_A.weight", "lowrank_B.weight")

    def shapes(self, shape: tuple[int, int], entry: int) -> list[tuple[int, ...]]:
        """(k, n) and (m, k) for a rank k."""
        return [*LowRankLinear.child_shapes(shape, entry)]

    def build(self, shape: tuple[int, int], rank: int, **options: Any) -> LowRankLinear:
        """See `RankedForm`."""
        return LowRankLinear(shape[1], shape[0], rank, form=self.name, **options)

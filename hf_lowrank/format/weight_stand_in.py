"""What a layer without a dense weight gives to code that asks for `weight`."""

from __future__ import annotations

from typing import Any

import torch

_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "grad")
_FLAGS = ("requires_grad", "is_leaf", "is_meta", "is_cuda", "is_sparse", "is_quantized")
_QUESTIONS = ("size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous")
_TYPE_QUESTIONS = ("is_floating_point", "is_complex", "requires_grad_", "__len__")
# What may be asked of a weight that has no values; by identity, as torch hands functions over.
METADATA = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _PROPERTIES + _FLAGS]
    + [getattr(torch.Tensor, name) for name in _QUESTIONS + _TYPE_QUESTIONS]
    + [torch.is_floating_point, torch.is_complex]
)
_ITSELF = (torch.Tensor.data.__get__, torch.Tensor.detach)  # type: ignore[attr-defined]
_FILLS = ("normal_", "uniform_", "fill_", "zero_", "constant_", "kaiming_uniform_")


class WeightStandIn(torch.Tensor):
    """Shape and dtype of a dense weight, on the meta device; whatever needs its values raises.

    Without that, a CPU would compute with it and return memory that nobody has written.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Answers what is asked of its form, ignores initial values, and refuses all else.

        Raises:
            RuntimeError: The function needs values.
        """
        if func in METADATA or func in _ITSELF:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        name = getattr(func, "__name__", str(func))
        if name in _FILLS:
            return args[0] if args else kwargs["tensor"]
        raise RuntimeError(
            f"{torch.overrides.resolve_name(func) or name} was given the weight of a "
            "LowRankLinear, which has a shape and a dtype but no values; call the layer itself, "
            "or use its dense_weight()."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightStandIn:
        return torch.empty(self.shape, dtype=self.dtype, device="meta").as_subclass(WeightStandIn)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WeightStandIn(shape={tuple(self.shape)}, dtype={self.dtype})"

"""How large the file of a model will be under a plan, before anything is cut."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.forms.stored_form import stored_form
from hf_lowrank.format.torchao_weights import num_bytes
from hf_lowrank.modeling.weight_precision import Weights, bits_of, matrix_bytes
from hf_lowrank.ranks.plan import ExpertsPlan, RankPlan

_ENTRY = 110  # bytes of a tensor's entry in the header of a safetensors file, without its name
_INT32 = 4  # what a form holds beside its matrices are orders


class SizeOnDisk:
    """Bytes of model.safetensors under a plan; a little more than there will be, never less.

    Biases count at their dense size, also those of channels that are lost.

    Args:
        model: The dense model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        tensors = {t.data_ptr(): (name, t) for name, t in model.state_dict().items()}
        self.dense = sum(num_bytes(t) + _ENTRY + len(name) for name, t in tensors.values())

    def __call__(self, plan: RankPlan, weights: Weights) -> int:
        """Bytes under a plan.

        Args:
            plan: Ranks and narrowed layers.
            weights: Type, or types, of the weights.
        """
        left = {**plan.shapes, **plan.narrowed}
        layers = (self.layer(n, left[n], r, plan.form, weights) for n, r in plan.ranks.items())
        return (
            self.besides(plan.ranks)
            + sum(layers)
            + sum(self.experts(name, left) for name, left in plan.experts.items())
        )

    def experts(self, name: str, left: ExpertsPlan) -> int:
        """Bytes that smaller experts take more than the dense ones, mostly less than none."""
        down = self.model.get_submodule(name)._parameters["down_proj"]
        assert down is not None
        saved = (left.kept_parameters - left.dense_parameters) * down.element_size()
        # Many architectures store each expert's matrices apart.
        return saved + 3 * left.experts * (_ENTRY + len(name) + len(".999.gate_proj.weight"))

    def besides(self, names: Iterable[str]) -> int:
        """Bytes of all but the weights of some dense layers."""
        weights = (linear_weight(self.model.get_submodule(name)) for name in names)
        return self.dense - sum(map(num_bytes, weights))

    def layer(
        self, name: str, shape: tuple[int, int], rank: int | None, form: str, weights: Weights
    ) -> int:
        """Bytes of a layer's matrices, and of the header entries that it has beyond the first.

        Args:
            name: Of the layer.
            shape: (m, n), what is left of them.
            rank: None for a layer that has none.
            form: Stored form of layers with a rank.
            weights: Type, or types, of the weights.
        """
        size = linear_weight(self.model.get_submodule(name)).element_size()
        tensors: dict[str, tuple[int, ...]] = {"weight": shape}
        if rank is not None:
            stored = stored_form(form)
            tensors = dict(zip(stored.tensors, stored.shapes(shape, rank), strict=True))
        total, entries = 0, -1
        for end, each in tensors.items():
            bits = None
            if end.endswith("weight"):
                module = f"{name}.{end}".removesuffix(".weight")
                bits = bits_of("dense" if rank is None else form, module, weights)
                total += matrix_bytes((each[0], each[1]), bits, size)
            else:
                total += _INT32 * math.prod(each)
            entries += 1 if bits is None else 2
        return total + entries * (_ENTRY + len(name) + len("lowrank_A._weight_qdata"))

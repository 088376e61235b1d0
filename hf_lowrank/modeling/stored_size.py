"""How large the file of a model will be under a plan, before anything is cut."""

from __future__ import annotations

import math

import torch
from torch import nn

from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.forms.stored_form import stored_form
from hf_lowrank.format.torchao_weights import num_bytes
from hf_lowrank.modeling.weight_precision import bits_of, matrix_bytes
from hf_lowrank.ranks.plan import RankPlan

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

    def __call__(self, plan: RankPlan, weights: str | None) -> int:
        """Bytes under a plan.

        Args:
            plan: Ranks and narrowed layers.
            weights: "int8", "int4", or None for weights as they are.
        """
        total = self.dense
        for name, rank in plan.ranks.items():
            weight = linear_weight(self.model.get_submodule(name))
            total += self._layer(name, rank, plan, weight, weights) - num_bytes(weight)
        for name, left in plan.experts.items():
            down = self.model.get_submodule(name)._parameters["down_proj"]
            assert down is not None
            total += (left.kept_parameters - left.dense_parameters) * down.element_size()
            # Many architectures store each expert's matrices apart.
            total += 3 * left.experts * (_ENTRY + len(name) + len(".999.gate_proj.weight"))
        return total

    def _layer(
        self,
        name: str,
        rank: int | None,
        plan: RankPlan,
        weight: torch.Tensor,
        weights: str | None,
    ) -> int:
        """Bytes of a layer's matrices, and of the header entries that it has beyond the first."""
        shape, form_name = plan.shapes[name], "dense" if rank is None else plan.form
        if rank is None:
            whole = plan.narrowed.get(name, shape)
            tensors: dict[str, tuple[int, ...]] = {"weight": (whole[0], whole[1])}
        else:
            form = stored_form(plan.form)
            tensors = dict(zip(form.tensors, form.shapes(shape, rank), strict=True))
        total = 0
        for end, each in tensors.items():
            if end.endswith("weight"):
                bits = weights and bits_of(form_name, end.removesuffix(".weight"), weights)
                total += matrix_bytes((each[0], each[1]), bits or None, weight.element_size())
            else:
                total += _INT32 * math.prod(each)
        entries = len(tensors) * (1 if weights is None else 2)
        return total + (entries - 1) * (_ENTRY + len(name) + len("lowrank_A._weight_qdata"))

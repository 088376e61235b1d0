"""How vLLM holds and multiplies a linear layer of which some part is compressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from hf_lowrank.errors import CheckpointError
from hf_lowrank.serving.vllm.shards import ListedLayers, Shard, Stretch
from hf_lowrank.serving.vllm.stacked import StackedProducts, cut, rank_share

_BY_OUTPUTS = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)
# Others spread their weights over the ranks in ways of their own.
SERVED = (*_BY_OUTPUTS, ReplicatedLinear, RowParallelLinear)


class LowRankLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Holds the layers of a checkpoint that vLLM has merged into one, each in its stored form.

    Until all tensors have come, a layer has an empty parameter for each name that the file may
    use, so that vLLM's loaders find it; what comes is cut to the rank and put aside. Then they
    give way to products.

    Args:
        listed: What config.json lists.
        names: Names in the checkpoint of the layers inside this one.
        is_transposed: Whether vLLM's model transposes what it loads, as GPT-2's does, which stores
            dense weights so but no compressed ones.
        check_all: Called when a layer has been loaded.
    """

    def __init__(
        self,
        listed: ListedLayers,
        names: Sequence[str],
        is_transposed: bool,
        check_all: Callable[[], None],
    ) -> None:
        self._listed = listed
        self._names = names
        self._is_transposed = is_transposed
        self._check_all = check_all
        self._multiply = UnquantizedLinearMethod()
        self._shards: list[Shard] = []
        self._held: list[dict[str, torch.Tensor]] = []

    def create_weights(
        self,
        layer: Any,  # noqa: ANN401
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """See `LinearMethodBase`; the sizes are the dense layer's."""
        outputs = _outputs(layer, output_partition_sizes)
        rank = layer.tp_rank if type(layer) is RowParallelLinear else 0
        inputs = Stretch(input_size, rank * input_size_per_partition, input_size_per_partition)
        self._shards = self._listed.shards(self._names, outputs, inputs, layer.has_bias)
        self._held = [{} for _ in self._shards]
        self._dtype = params_dtype
        for name in {name for shard in self._shards for name in shard.tensors} - {"bias"}:
            module, _, end = name.rpartition(".")
            if module and not hasattr(layer, module):
                setattr(layer, module, nn.Module())
            dtype = torch.int32 if name == "lowrank_order" else params_dtype  # else vLLM warns
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            empty.weight_loader = partial(self._take, name)  # type: ignore[attr-defined]
            (getattr(layer, module) if module else layer).register_parameter(end, empty)
        # vLLM gives this one to the bias that it makes next, and calls it with the layer itself for
        # a name that the layer does not have.
        layer.weight_loader = partial(self._take, "bias")

    def _take(
        self,
        name: str,
        parameter: Any,  # noqa: ANN401
        tensor: torch.Tensor,
        shard_id: str | int | None = None,
    ) -> None:
        """Puts a tensor of the file aside.

        Raises:
            CheckpointError: It belongs to none of the layers, or has another shape.
        """
        index = "qkv".index(shard_id) if isinstance(shard_id, str) else shard_id or 0
        shard = self._shards[index]
        if self._is_transposed and name.endswith("weight"):
            tensor = tensor.t()
        expected = shard.tensors.get(name)
        if expected is None or isinstance(parameter, nn.Module):
            raise CheckpointError(
                f"{shard.name}: a tensor of shape {list(tensor.shape)} is left over, which a layer "
                f"of form {shard.form!r} has no place for."
            )
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{shard.name}.{name} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(expected)}."
            )
        part = cut(shard, name, tensor)
        dtype = self._dtype if name.endswith(("weight", "bias")) else part.dtype
        self._held[index][name] = part.to(device=parameter.device, dtype=dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Makes products of what has been loaded.

        Raises:
            CheckpointError: A tensor has not come, or the order of a compact layer is none.
        """
        self._check_all()
        shares, biases, names = [], [], set()
        for shard, held in zip(self._shards, self._held, strict=True):
            missing = sorted(shard.tensors.keys() - held.keys())
            if missing:
                raise CheckpointError(f"{shard.name}: the checkpoint has no {', '.join(missing)}.")
            shares.append(rank_share(shard, held, self._dtype))
            biases += [tensor for name, tensor in held.items() if name.endswith("bias")]
            names |= {name.partition(".")[0] for name in held}
        for name in names - {"bias"}:
            delattr(layer, name)
        layer.lowrank = StackedProducts(shares, partial(_Product, self._multiply))
        if biases:
            layer.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self._held = []

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `LinearMethodBase`."""
        output: torch.Tensor = layer.lowrank(x)  # type: ignore[operator]
        return output if bias is None else output + bias


class _Product(nn.Module):
    """A product with a weight, by the kernel that vLLM takes for dense layers."""

    def __init__(self, method: Any, weight: torch.Tensor) -> None:  # noqa: ANN401
        super().__init__()
        self.method = method
        self.weight = nn.Parameter(weight, requires_grad=False)
        method.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.method.apply(self, x)
        return output


def _outputs(layer: Any, sizes: Sequence[int]) -> list[Stretch]:  # noqa: ANN401
    """The rank's stretches of a layer's outputs.

    With more ranks than heads of keys and values, vLLM gives several ranks the same head.
    """
    if type(layer) not in _BY_OUTPUTS:
        return [Stretch(size, 0, size) for size in sizes]
    replicas = [1] * len(sizes)
    if type(layer) is QKVParallelLinear:
        replicas[1:] = [layer.num_kv_head_replicas] * (len(sizes) - 1)
    return [
        Stretch(size * layer.tp_size // each, layer.tp_rank // each * size, size)
        for size, each in zip(sizes, replicas, strict=True)
    ]

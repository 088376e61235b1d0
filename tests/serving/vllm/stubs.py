"""Stand-ins for the classes of vLLM 0.32 that the plugin builds on, and a merged layer to fill.

They do in the same order what vLLM does: create weights at the dense sizes, make a bias behind
them, hand tensors to the loader of the parameter with the name, or of the layer if there is none.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    calls: ClassVar[list[tuple[int, ...]]] = []

    def process_weights_after_loading(self, layer):
        layer.packed = layer.weight.detach().clone()
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer, x, bias=None):
        assert bias is None
        self.calls.append(tuple(layer.packed.shape))
        return F.linear(x, layer.packed)


class LinearBase(nn.Module):
    """A layer with the sizes of its whole outputs, on one of the ranks."""

    def __init__(self, method, inputs, outputs, *, bias=False, rank=0, ranks=1, replicas=1):
        super().__init__()
        self.quant_method, self.has_bias = method, bias
        self.tp_rank, self.tp_size, self.num_kv_head_replicas = rank, ranks, replicas
        by_inputs = type(self) is RowParallelLinear
        spread = ranks if isinstance(self, ColumnParallelLinear) else 1
        sizes = [outputs[0] // spread, *(m * replicas // spread for m in outputs[1:])]
        here = inputs // ranks if by_inputs else inputs
        method.create_weights(self, here, sizes, inputs, sum(outputs), torch.float32)
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(sizes)), requires_grad=False)
            self.bias.weight_loader = self.weight_loader
        else:
            self.register_parameter("bias", None)

    def load(self, name, tensor, shard_id=None):
        module, _, end = name.rpartition(".")
        parameter = getattr(self.get_submodule(module), end, self)
        if parameter is not None:
            arguments = (parameter, tensor) if shard_id is None else (parameter, tensor, shard_id)
            parameter.weight_loader(*arguments)

    def forward(self, x):
        self.quant_method.process_weights_after_loading(self)
        bias = None if isinstance(self, RowParallelLinear) and self.tp_rank else self.bias
        return self.quant_method.apply(self, x, bias)


class ReplicatedLinear(LinearBase):
    pass


class ColumnParallelLinear(LinearBase):
    pass


class MergedColumnParallelLinear(ColumnParallelLinear):
    pass


class QKVParallelLinear(ColumnParallelLinear):
    pass


class RowParallelLinear(LinearBase):
    pass


class OtherLinear(ColumnParallelLinear):
    """Spreads its weights in a way of its own."""


class QuantizationConfig:
    online_quantization_config = None

    def __init__(self):
        self.packed_modules_mapping = {}


REGISTERED = {}
RUN = SimpleNamespace(lora_config=None, parallel_config=SimpleNamespace())


def register_quantization_config(name):
    def register(config_class):
        return REGISTERED.setdefault(name, config_class)

    return register


def reset_run():
    RUN.lora_config, RUN.parallel_config.pipeline_parallel_size = None, 1


def modules():
    """The stand-ins by the names of vLLM's modules."""
    layers = "vllm.model_executor.layers"
    found = {
        f"{layers}.linear": sys.modules[__name__],
        f"{layers}.quantization": SimpleNamespace(
            register_quantization_config=register_quantization_config
        ),
        f"{layers}.quantization.base_config": sys.modules[__name__],
        "vllm.config": SimpleNamespace(get_current_vllm_config=lambda: RUN),
    }
    packages = ("vllm", "vllm.model_executor", layers)
    return {name: ModuleType(name) for name in packages} | found

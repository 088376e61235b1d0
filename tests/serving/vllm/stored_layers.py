"""Random layers in every stored form: config.json's settings, the file's tensors, dense weights."""

import torch
from torch import nn

from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.forms.compact import CompactLinear
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.forms.narrowed import NarrowedLinear
from hf_lowrank.format.forms.quantized import QuantizedLinear
from hf_lowrank.format.layout import Layout, Precision
from hf_lowrank.format.torchao_weights import quantize_


class Stored:
    """Layers by name, as a checkpoint holds them."""

    def __init__(self, form="factors"):
        self.settings = {"format_version": 2, "form": form}
        self.settings |= {"ranks": {}, "narrowed": {}, "quantized": {}}
        self.tensors, self.weights, self.biases = {}, {}, {}

    @property
    def layout(self):
        return Layout.from_settings(self.settings)

    def add(self, name, kind, shape, *, bias=False, weights=None):
        """A layer of a kind: a rank, "dense", or a narrowed shape."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(len(self.weights))
            layer = self._layer(name, kind, shape, bias)
            for parameter in layer.parameters():
                parameter.normal_()
            if isinstance(layer, CompactLinear):
                layer.lowrank_order.copy_(torch.randperm(len(layer.lowrank_order)))
            if weights is not None:
                self._quantize(name, layer, weights)
            plain = layer if isinstance(layer, nn.Linear) else layer.to_dense()
            self.weights[name] = linear_weight(plain).clone()
            self.biases[name] = plain.bias.clone() if bias else torch.zeros(plain.out_features)
        self.tensors[name] = {
            key: each.detach().clone() for key, each in layer.state_dict().items()
        }
        return self

    def _layer(self, name, kind, shape, bias):
        rows, columns = shape
        if isinstance(kind, int):
            self.settings["ranks"][name] = kind
            made = CompactLinear if self.settings["form"] == "compact" else LowRankLinear
            return made(columns, rows, kind, bias=bias)
        if isinstance(kind, tuple):
            self.settings["narrowed"][name] = list(kind)
            return NarrowedLinear(kind[1], kind[0], bias, dense_shape=shape)
        return QuantizedLinear(columns, rows, bias)

    def _quantize(self, name, layer, weights):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                columns = module.in_features
                block = (1, columns) if weights == "int8" else (1, 4)
                precision = Precision(8 if weights == "int8" else 4, block)
                quantize_(module, precision)
                full = f"{name}.{path}".rstrip(".")
                self.settings["quantized"][full] = precision.to_json()

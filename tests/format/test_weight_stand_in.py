"""`LowRankLinear.weight`: it answers what is asked of its form, and refuses to be computed with."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.format.forms.factors import LowRankLinear

INPUTS = torch.arange(18.0).view(2, 9)


def make_layer(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LowRankLinear(9, 6, 3, dtype=dtype)


@pytest.mark.parametrize(
    ("compute", "function"),
    [
        (lambda weight: F.linear(INPUTS, weight), "torch.nn.functional.linear"),
        (lambda weight: INPUTS @ weight.T, "torch.Tensor.T.__get__"),
        (lambda weight: weight @ INPUTS[0], "torch.Tensor.matmul"),
        (lambda weight: weight + 1, "torch.Tensor.add"),
        (lambda weight: weight.mul_(2), "torch.Tensor.mul_"),
        (lambda weight: weight.copy_(torch.ones(6, 9)), "torch.Tensor.copy_"),
        (lambda weight: weight.norm(), "torch.Tensor.norm"),
        (lambda weight: torch.cat([torch.ones(1, 9), weight]), "torch.cat"),
        (lambda weight: weight[0, 0].item(), "torch.Tensor.__getitem__"),
        (lambda weight: weight.data.sum(), "torch.Tensor.sum"),
        (lambda weight: weight.to("cpu"), "torch.Tensor.to"),
        (lambda weight: torch.ops.aten.mm(INPUTS, weight), "aten.mm"),
    ],
)
def test_computing_with_the_weight_is_refused(compute, function):
    message = (
        rf"^{function} was given the weight of a LowRankLinear, which has a shape and a dtype but "
        r"no values; call the layer itself, or use its dense_weight\(\)\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        compute(make_layer().weight)


def test_the_form_of_the_weight_can_be_asked_for():
    weight = make_layer(torch.bfloat16).weight
    assert weight.shape == weight.data.shape == weight.size() == (6, 9)
    assert weight.dtype == torch.bfloat16
    assert (weight.ndim, weight.dim(), len(weight), weight.numel()) == (2, 2, 6, 54)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert repr(weight) == "WeightStandIn(shape=(6, 9), dtype=torch.bfloat16)"


@pytest.mark.parametrize(
    "fill",
    [
        nn.init.normal_,
        nn.init.uniform_,
        nn.init.zeros_,
        nn.init.ones_,
        nn.init.trunc_normal_,
        nn.init.xavier_uniform_,
        nn.init.kaiming_uniform_,
        nn.init.kaiming_normal_,
        lambda weight: nn.init.constant_(weight, 3.0),
        lambda weight: weight.data.normal_(0.0, 0.1),
    ],
)
def test_initial_values_are_ignored(fill):
    layer = make_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    fill(layer.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


class AsksForType(nn.Module):
    """As T5's feed-forward does before it calls its layer."""

    def __init__(self):
        super().__init__()
        self.wo = make_layer()

    def forward(self, inputs):
        if inputs.dtype != self.wo.weight.dtype:
            inputs = inputs.to(self.wo.weight.dtype)
        return self.wo(inputs)


@pytest.mark.parametrize("build", [make_layer, AsksForType])
def test_layers_compile_without_a_graph_break(build):
    module = build()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(INPUTS), module(INPUTS))


def test_layers_are_copied_and_pickled():
    layer = make_layer()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
        assert torch.equal(twin(INPUTS), layer(INPUTS))
        assert twin.weight.shape == (6, 9)


def test_the_fast_path_of_torchs_encoder_leaves_low_rank_layers_alone():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer = LowRankLinear(8, 16, 8)
    inputs = torch.randn(2, 5, 8)
    with torch.no_grad():
        wanted = encoder(inputs)
        left, middle, right = torch.linalg.svd(encoder.linear1.weight, full_matrices=False)
        layer.lowrank_A.weight.copy_(right)
        layer.lowrank_B.weight.copy_(left * middle)
        layer.lowrank_B.bias.copy_(encoder.linear1.bias)
        encoder.linear1 = layer
        torch.testing.assert_close(encoder(inputs), wanted)

"""`CompactLinear`: a matrix of rank k in k (m + n - k) numbers, pivots on the smaller side."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.forms.compact import CompactLinear
from hf_lowrank.modeling.surgery import lowrank_from_factors

SHAPES = [(9, 6), (6, 9), (7, 7)]


def dense(shape, bias=True, conv1d=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = Conv1D(*shape) if conv1d else nn.Linear(shape[1], shape[0], bias)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
        nn.init.normal_(layer.weight)
    return layer


def compact(shape, rank=3, **options):
    source = dense(shape, **options)
    left, sigma, right = torch.linalg.svd(linear_weight(source).double(), full_matrices=False)
    factors = Factors(left * sigma, right)
    return source, factors, lowrank_from_factors(source, factors, rank, "compact")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"conv1d": True}])
def test_it_computes_with_the_product(shape, options):
    source, factors, layer = compact(shape, **options)
    inputs = torch.randn(2, 4, shape[1])
    weight = factors.product(3).float()
    torch.testing.assert_close(layer.dense_weight(), weight)
    wanted = nn.functional.linear(inputs, weight, source.bias)
    torch.testing.assert_close(layer(inputs), wanted, rtol=1e-4, atol=1e-5)
    merged = layer.to_dense()
    assert type(merged) is type(source)
    torch.testing.assert_close(merged(inputs), wanted, rtol=1e-4, atol=1e-5)
    if source.bias is not None:
        torch.testing.assert_close(layer.bias, source.bias)
    assert layer.weight.shape == shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_it_holds_as_many_numbers_as_matrices_of_its_rank_have(shape, rank):
    layer = CompactLinear(shape[1], shape[0], rank, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == rank * (sum(shape) - rank)
    assert (layer.rank, layer.form) == (rank, "compact")
    assert f"rank={rank}, form=compact" in repr(layer)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_of_the_full_matrix_is_refused(rank):
    message = (
        rf"^rank {rank} is outside 1\.\.min\(9, 6\) - 1; lower the rank or keep the layer dense\.$"
    )
    with pytest.raises(ValueError, match=message):
        CompactLinear(6, 9, rank)


def test_an_order_that_names_a_place_twice_is_refused():
    layer = CompactLinear(6, 9, 2)
    layer.check_order("mlp.up")
    layer.lowrank_order[0] = 1
    message = r"^mlp\.up\.lowrank_order must hold each of 0 to 5 once; the checkpoint is damaged\.$"
    with pytest.raises(CheckpointError, match=message):
        layer.check_order("mlp.up")


@pytest.mark.parametrize("shape", SHAPES)
def test_it_compiles_without_a_graph_break_and_exports(shape):
    layer, inputs = compact(shape)[2].eval(), torch.randn(2, shape[1])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs), layer(inputs))
    exported = torch.export.export(layer, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), layer(inputs))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_copied_pickled_and_cast_with_its_order(shape):
    layer, inputs = compact(shape)[2], torch.randn(2, shape[1])
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(inputs), layer(inputs))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.lowrank_order.dtype == torch.int32
    torch.testing.assert_close(
        half(inputs.bfloat16()).float(), layer(inputs), rtol=0.05, atol=0.05 * shape[1]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_both_children_train_and_take_adapters(shape):
    model = nn.Sequential(compact(shape)[2])
    model(torch.randn(2, shape[1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    settings = LoraConfig(target_modules=["lowrank_A", "lowrank_B"], init_lora_weights=False)
    before = model(torch.ones(1, shape[1]))
    inject_adapter_in_model(settings, model)
    assert not torch.allclose(model(torch.ones(1, shape[1])), before)

"""`LowRankLinear`, and how it is put in place of named layers."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.layout import Layout
from hf_lowrank.format.rebuild import replace_with_lowrank_, resolve_module_name
from hf_lowrank.ranks.plan import break_even_rank
from tests.tiny_models import tiny_gpt2, tiny_llama

SHAPES = [(5, 8), (8, 5), (6, 6), (1, 7)]


def make_layer(out_features=6, in_features=9, rank=3, **options):
    torch.manual_seed(0)
    layer = LowRankLinear(in_features, out_features, rank, **options)
    if layer.lowrank_s is not None:
        nn.init.normal_(layer.lowrank_s)
    return layer


@pytest.mark.parametrize("shape", [*SHAPES, (768, 3072), (1, 1)])
def test_break_even_rank_is_the_smallest_rank_that_saves_nothing(shape):
    rows, columns = shape
    saving = [rank for rank in range(1, 2000) if rank * (rows + columns) < rows * columns]
    assert break_even_rank(rows, columns) == len(saving) + 1


@pytest.mark.parametrize("bias", [True, False])
def test_inference_form_is_b_times_a(bias):
    layer, inputs = make_layer(bias=bias), torch.randn(2, 5, 9)
    expected = inputs @ layer.lowrank_A.weight.T @ layer.lowrank_B.weight.T
    if bias:
        assert layer.bias.abs().sum() > 0
        expected = expected + layer.bias
    assert layer.form == "factors"
    assert layer(inputs).shape == (2, 5, 6)
    torch.testing.assert_close(layer(inputs), expected)


def test_training_form_scales_the_inner_features():
    layer, inputs = make_layer(form="usv"), torch.randn(4, 9)
    middle = torch.diag(layer.lowrank_s)
    weight = layer.lowrank_B.weight @ middle @ layer.lowrank_A.weight
    assert layer.form == "usv"
    assert layer.lowrank_s.std() > 0.1
    torch.testing.assert_close(layer(inputs), inputs @ weight.T + layer.bias)
    torch.testing.assert_close(layer.dense_weight(), weight)


def test_training_form_starts_with_a_spectrum_of_ones():
    assert LowRankLinear(4, 4, 2, form="usv").lowrank_s.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("form", ["factors", "usv"])
@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_to_dense_gives_the_same_output(shape, conv1d, form):
    layer = make_layer(*shape, rank=1, form=form, conv1d=conv1d)
    inputs = torch.randn(3, shape[1])
    dense = layer.to_dense()
    assert type(dense) is (Conv1D if conv1d else nn.Linear)
    assert linear_shape(dense) == shape
    torch.testing.assert_close(dense(inputs), layer(inputs))


def test_to_dense_keeps_dtype_and_missing_bias():
    dense = make_layer(bias=False, dtype=torch.bfloat16).to_dense()
    assert dense.bias is None
    assert dense.weight.dtype == torch.bfloat16


def test_dense_weight_of_half_precision_factors_is_not_rounded():
    layer = make_layer(dtype=torch.bfloat16)
    exact = layer.lowrank_B.weight.double() @ layer.lowrank_A.weight.double()
    assert layer.dense_weight().dtype == torch.float32
    torch.testing.assert_close(layer.dense_weight().double(), exact, rtol=1e-5, atol=1e-6)


def test_dense_weight_keeps_double_precision():
    assert make_layer(dtype=torch.float64).dense_weight().dtype == torch.float64


@pytest.mark.parametrize(
    ("form", "bias", "names"),
    [
        ("factors", True, {"lowrank_A.weight", "lowrank_B.weight", "lowrank_B.bias"}),
        ("factors", False, {"lowrank_A.weight", "lowrank_B.weight"}),
        ("usv", False, {"lowrank_A.weight", "lowrank_B.weight", "lowrank_s"}),
    ],
)
def test_state_holds_the_factors_and_nothing_else(form, bias, names):
    assert set(make_layer(form=form, bias=bias).state_dict()) == names


def test_factors_cost_rank_times_rows_plus_columns():
    layer = make_layer(out_features=6, in_features=9, rank=2, bias=False)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 2 * (6 + 9)
    assert layer.rank == 2


def test_every_factor_gets_a_gradient():
    layer = make_layer(form="usv")
    layer(torch.randn(4, 9)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_weight_stands_in_for_shape_and_dtype():
    layer = make_layer(out_features=6, in_features=9)
    assert layer.weight.shape == (6, 9)
    assert layer.weight.device.type == "meta"
    assert layer.half().weight.dtype == torch.float16


def test_initialising_the_weight_in_place_changes_nothing():
    layer = make_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    nn.init.normal_(layer.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_weight_cannot_be_assigned():
    with pytest.raises(AttributeError, match="weight"):
        make_layer().weight = torch.zeros(6, 9)


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_rank_outside_the_limits_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.min\(6, 9\)"):
        LowRankLinear(9, 6, rank)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be one of factors, usv, got 'svd'"):
        LowRankLinear(9, 6, 2, form="svd")


def test_repr_tells_the_sizes():
    assert "in_features=9, out_features=6, rank=3, form=factors" in repr(make_layer())


def test_linear_shape_is_out_then_in_for_both_layouts():
    assert linear_shape(nn.Linear(3, 7)) == (7, 3)
    assert linear_shape(Conv1D(7, 3)) == (7, 3)


def test_module_names_resolve_with_and_without_the_prefix_of_a_head_class():
    model = tiny_llama()
    name = "layers.0.self_attn.q_proj"
    assert resolve_module_name(model, f"model.{name}") == f"model.{name}"
    assert resolve_module_name(model, name) == f"model.{name}"
    assert resolve_module_name(model.model, f"model.{name}") == name
    assert resolve_module_name(model, "layers.2.self_attn.q_proj") is None


def test_replace_builds_empty_layers_of_the_given_ranks():
    model = tiny_gpt2()
    name = "transformer.h.0.attn.c_attn"
    kept = model.transformer.h[1].attn.c_attn
    replace_with_lowrank_(model, Layout({name: 5, "transformer.h.1.attn.c_attn": None}, form="usv"))
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear)
    assert (layer.out_features, layer.in_features, layer.rank) == (96, 32, 5)
    assert (layer.form, layer.conv1d, layer.bias is not None) == ("usv", True, True)
    assert model.transformer.h[1].attn.c_attn is kept


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        (
            "model.layers.7.mlp.up_proj",
            2,
            "model.layers.7.mlp.up_proj a rank, but LlamaForCausalLM has",
        ),
        ("model.norm", 2, "model.norm: only nn.Linear and Conv1D .* not LlamaRMSNorm"),
        ("model.layers.0.mlp.up_proj", 40, r"up_proj: rank 40 is outside 1\.\.min\(64, 32\)"),
    ],
)
def test_replace_refuses_what_does_not_fit_the_model(name, rank, message):
    with pytest.raises(ValueError, match=message):
        replace_with_lowrank_(tiny_llama(), Layout({name: rank}))

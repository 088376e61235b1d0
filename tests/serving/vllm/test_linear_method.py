"""A merged layer on every rank, filled by loaders like vLLM's: the sum is the dense layer."""

import pytest
import torch

from hf_lowrank.errors import CheckpointError
from hf_lowrank.serving.vllm.shards import ListedLayers
from tests.serving.vllm import stubs
from tests.serving.vllm.stored_layers import Stored

N = 32
RANKS = [1, 2, 4]
# Shapes with 4 heads of 8 for q and 2 for k and v, and a feed-forward of 48 channels.
Q, KV, UP, DOWN = (32, N), (16, N), (48, N), (N, 48)


@pytest.fixture(autouse=True)
def _needs_the_module(vllm_config):
    global method
    import hf_lowrank.serving.vllm.vllm_linear as method


def build(stored, names, layer_class, inputs, outputs, *, transposed=False, **options):
    listed = ListedLayers(stored.layout)
    checked = []
    made = method.LowRankLinearMethod(listed, names, transposed, lambda: checked.append(1))
    layer = layer_class(made, inputs, outputs, **options)
    layer.checked = checked
    return layer


def fill(layer, stored, names, shard_ids=(None,), *, transposed=False):
    for name, shard_id in zip(names, shard_ids, strict=True):
        for end, tensor in stored.tensors[name].items():
            turned = transposed and end.split(".")[-1] == "weight"
            layer.load(end, tensor.t() if turned else tensor, shard_id)
    return layer


def dense(stored, names, x):
    return [x @ stored.weights[name].T + stored.biases[name] for name in names]


def by_outputs(stored, names, layer_class, outputs, ids, ranks, bias, **options):
    """Outputs of all ranks, each a list with one tensor for each layer inside."""
    x = torch.randn(5, N, generator=torch.Generator().manual_seed(1))
    found = []
    for rank in range(ranks):
        layer = build(
            stored, names, layer_class, N, outputs, bias=bias, rank=rank, ranks=ranks, **options
        )
        found.append(fill(layer, stored, names, ids)(x))
    return x, found


def check_qkv(stored, bias, ranks):
    names, replicas = ["q", "k", "v"], max(1, ranks // 2)
    x, found = by_outputs(
        stored, names, stubs.QKVParallelLinear, (32, 16, 16), "qkv", ranks, bias, replicas=replicas
    )
    heads = [each.unflatten(-1, (-1, 8)) for each in dense(stored, names, x)]
    for rank, output in enumerate(found):
        q = heads[0].chunk(ranks, dim=1)[rank]
        kv = [each.chunk(min(ranks, 2), dim=1)[rank // replicas] for each in heads[1:]]
        expected = torch.cat([q, *kv], dim=1).flatten(1)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


QKV_KINDS = {
    "all": ("compact", 9, 5, 7),
    "dense q": ("compact", "dense", 5, 7),
    "dense k": ("compact", 9, "dense", 7),
    "dense v": ("factors", 9, 5, "dense"),
    "factors": ("factors", 9, 5, 7),
    "above break-even": ("factors", 30, 15, 7),
    "nearly full rank": ("compact", 31, 15, 15),
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kinds", QKV_KINDS.values(), ids=QKV_KINDS)
def test_q_k_and_v_of_any_forms_give_what_their_dense_layers_give(kinds, bias, ranks):
    stored = Stored(kinds[0])
    for name, kind, shape in zip("qkv", kinds[1:], (Q, KV, KV), strict=True):
        stored.add(name, kind, shape, bias=bias)
    check_qkv(stored, bias, ranks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("form", ["compact", "factors"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_multiplied_out(weights, form, ranks):
    pytest.importorskip("torchao.quantization")
    stored = Stored(form)
    stored.add("q", 8, Q, weights=weights).add("k", 12, KV, weights=weights)
    stored.add("v", "dense", KV, weights=weights)
    check_qkv(stored, False, ranks)


def halves(stored, names, ranks, channels, bias):
    """gate and up on each rank; every rank has the same channels of both."""
    x, found = by_outputs(
        stored, names, stubs.MergedColumnParallelLinear, (48, 48), (0, 1), ranks, bias
    )
    expected = dense(stored, names, x)
    ends = [channels * rank // ranks for rank in range(ranks + 1)]
    for rank, output in enumerate(found):
        part = slice(ends[rank], ends[rank + 1])
        torch.testing.assert_close(
            output, torch.cat([each[:, part] for each in expected], dim=1), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_may_lose_channels(bias, ranks):
    stored = Stored().add("gate", (37, N), UP, bias=bias).add("up", (37, N), UP, bias=bias)
    halves(stored, ["gate", "up"], ranks, 37, bias)


@pytest.mark.parametrize("ranks", RANKS)
def test_gate_and_up_may_have_ranks(ranks):
    stored = Stored("compact").add("gate", 11, UP).add("up", "dense", UP)
    halves(stored, ["gate", "up"], ranks, 48, False)


ROW_KINDS = {
    "compact, pivots among the outputs": ("compact", 11, DOWN),
    "compact, pivots among the inputs": ("compact", 11, Q),
    "nearly full rank": ("compact", 31, Q),
    "factors": ("factors", 11, DOWN),
    "narrowed": ("factors", (N, 29), DOWN),
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ROW_KINDS.values(), ids=ROW_KINDS)
def test_ranks_that_share_the_inputs_add_up(kind, bias, ranks):
    form, entry, shape = kind
    stored = Stored(form).add("down", entry, shape, bias=bias)
    columns = stored.weights["down"].shape[1]
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    ends = [columns * rank // ranks for rank in range(ranks + 1)]
    total = 0
    for rank in range(ranks):
        layer = build(
            stored,
            ["down"],
            stubs.RowParallelLinear,
            shape[1],
            shape[:1],
            bias=bias,
            rank=rank,
            ranks=ranks,
        )
        total = total + fill(layer, stored, ["down"])(x[:, ends[rank] : ends[rank + 1]])
    expected = dense(stored, ["down"], x)[0]
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("form", ["compact", "factors"])
def test_layers_that_are_one_in_the_file_are_spread_part_by_part(form, ranks):
    stored = Stored(form).add("qkv_proj", 13, (64, N), bias=True)
    x, found = by_outputs(
        stored, ["qkv_proj"], stubs.QKVParallelLinear, (32, 16, 16), (None,), ranks, True
    )
    parts = dense(stored, ["qkv_proj"], x)[0].split([32, 16, 16], dim=1)
    for rank, output in enumerate(found):
        expected = torch.cat([each.chunk(ranks, dim=1)[rank] for each in parts], dim=1)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [8, (N, N), (16, N)])
def test_what_gpt2_transposes_is_turned_back(kind):
    stored = Stored("compact").add("c_fc", kind, UP, bias=True)
    options = {"bias": True, "transposed": True}
    layer = build(stored, ["c_fc"], stubs.ColumnParallelLinear, N, (48,), **options)
    x = torch.randn(5, N)
    output = fill(layer, stored, ["c_fc"], transposed=True)(x)
    torch.testing.assert_close(output, dense(stored, ["c_fc"], x)[0], rtol=1e-4, atol=1e-4)


def test_what_every_rank_holds_is_not_spread():
    stored = Stored().add("gate", 5, Q)
    layer = build(stored, ["gate"], stubs.ReplicatedLinear, N, (32,), rank=1, ranks=2)
    x = torch.randn(5, N)
    torch.testing.assert_close(
        fill(layer, stored, ["gate"])(x), dense(stored, ["gate"], x)[0], rtol=1e-4, atol=1e-4
    )
    assert layer.checked == [1]


def test_the_first_products_are_one():
    stored = Stored("factors").add("q", 9, Q).add("k", 5, KV).add("v", "dense", KV)
    layer = build(stored, ["q", "k", "v"], stubs.QKVParallelLinear, N, (32, 16, 16))
    fill(layer, stored, ["q", "k", "v"], "qkv")
    stubs.UnquantizedLinearMethod.calls.clear()
    layer(torch.randn(5, N))
    assert stubs.UnquantizedLinearMethod.calls == [(9 + 5 + 16, N), (32, 9), (16, 5)]


def test_nothing_of_the_loading_stays():
    stored = Stored("compact").add("q", 9, Q, bias=True)
    layer = build(stored, ["q"], stubs.ColumnParallelLinear, N, (32,), bias=True)
    fill(layer, stored, ["q"])(torch.randn(1, N))
    assert [name for name, _ in layer.named_children()] == ["lowrank"]
    assert [name for name, _ in layer.named_parameters(recurse=False)] == ["bias"]


@pytest.mark.parametrize("lost", ["lowrank_A.weight", "lowrank_order", "lowrank_B.bias"])
def test_a_missing_tensor_is_refused_by_name(lost):
    stored = Stored("compact").add("model.q", 9, Q, bias=True)
    del stored.tensors["model.q"][lost]
    layer = build(stored, ["model.q"], stubs.ColumnParallelLinear, N, (32,), bias=True)
    with pytest.raises(CheckpointError, match=rf"^model\.q: the checkpoint has no {lost}\.$"):
        fill(layer, stored, ["model.q"])(torch.randn(1, N))


def test_a_missing_layer_inside_a_merged_one_is_refused_by_name():
    stored = Stored().add("q", 9, Q).add("k", 5, KV).add("v", "dense", KV)
    layer = build(stored, ["q", "k", "v"], stubs.QKVParallelLinear, N, (32, 16, 16))
    with pytest.raises(CheckpointError, match=r"^v: the checkpoint has no weight\.$"):
        fill(layer, stored, ["q", "k"], "qk")(torch.randn(1, N))


@pytest.mark.parametrize("name", ["lowrank_B.weight", "lowrank_s", "weight"])
def test_a_left_over_tensor_is_refused_by_name(name):
    stored = Stored().add("q", 9, Q).add("k", 5, KV).add("v", "dense", KV)
    layer = build(stored, ["q", "k", "v"], stubs.QKVParallelLinear, N, (32, 16, 16))
    owner, form = ("q", "factors") if name == "weight" else ("v", "dense")
    message = rf"^{owner}: a tensor of shape \[3, 3\] is left over, .* of form '{form}' has no"
    with pytest.raises(CheckpointError, match=message):
        layer.load(name, torch.ones(3, 3), owner)


def test_a_bias_too_many_is_refused_by_name():
    stored = Stored().add("down", 9, Q, bias=True)
    layer = build(stored, ["down"], stubs.RowParallelLinear, N, (32,))
    with pytest.raises(CheckpointError, match=r"^down: a tensor of shape \[32\] is left over"):
        fill(layer, stored, ["down"])


def test_a_tensor_of_another_shape_is_refused_by_name():
    stored = Stored().add("q", 9, Q)
    layer = build(stored, ["q"], stubs.ColumnParallelLinear, N, (32,))
    message = r"^q\.lowrank_A\.weight has shape \[8, 32\], config\.json asks for \[9, 32\]\.$"
    with pytest.raises(CheckpointError, match=message):
        layer.load("lowrank_A.weight", torch.ones(8, N))


def test_an_order_that_is_none_is_refused_by_name():
    stored = Stored("compact").add("q", 9, Q)
    stored.tensors["q"]["lowrank_order"][0] = stored.tensors["q"]["lowrank_order"][1]
    layer = build(stored, ["q"], stubs.ColumnParallelLinear, N, (32,))
    with pytest.raises(CheckpointError, match=r"^q\.lowrank_order must hold each of 0 to 31 once"):
        fill(layer, stored, ["q"])(torch.randn(1, N))

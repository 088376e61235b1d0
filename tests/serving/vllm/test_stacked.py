"""How many weights a rank reads for each token."""

import pytest
import torch

from hf_lowrank.serving.vllm.shards import ListedLayers, Stretch
from hf_lowrank.serving.vllm.stacked import cut, rank_share
from tests.serving.vllm.stored_layers import Stored

N = 32


def share(form, kind, shape, *, outputs=None, inputs=None):
    stored = Stored(form).add("q", kind, shape)
    outputs = outputs or Stretch(shape[0], 0, shape[0])
    inputs = inputs or Stretch(shape[1], 0, shape[1])
    (shard,) = ListedLayers(stored.layout).shards(["q"], [outputs], inputs, has_bias=False)
    tensors = {name: cut(shard, name, each) for name, each in stored.tensors["q"].items()}
    return rank_share(shard, tensors, torch.float32)


@pytest.mark.parametrize("shape", [(N, N), (48, N), (N, 48)])
@pytest.mark.parametrize("rank", [1, 16, 31])
def test_a_whole_compact_layer_stays_compact(shape, rank):
    found = share("compact", rank, shape)
    assert found.numel == rank * (sum(shape) - rank)


@pytest.mark.parametrize(("rank", "numel"), [(15, 15 * 64), (16, N * N), (32, N * N)])
def test_factors_that_are_no_fewer_are_multiplied_out(rank, numel):
    found = share("factors", rank, (N, N))
    assert found.numel == numel
    assert (found.second is None) == (rank >= 16)


@pytest.mark.parametrize("rank", [8, 20])
def test_a_half_of_the_outputs_keeps_the_first_factor_whole(rank):
    found = share("compact", rank, (N, N), outputs=Stretch(N, 16, 16))
    assert found.numel == min(rank * (N - rank) + 16 * rank, 16 * N)


@pytest.mark.parametrize("rank", [4, 20])
def test_a_half_of_the_inputs_keeps_the_second_factor_whole(rank):
    found = share("compact", rank, (N, N), inputs=Stretch(N, 16, 16))
    assert found.numel == min(rank * 16 + N * rank, 16 * N)

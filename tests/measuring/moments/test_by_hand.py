"""Moments against backpropagation by hand in numpy, and batches of any size."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.measuring import token_sums
from tests.measuring.moments import (
    ALL,
    LENGTHS,
    SECOND,
    Net,
    assert_equal_moments,
    collect_net,
    net_batch,
    split,
)


def by_hand(net, batch):
    """Layer name: (W, x, g, sequence of each token), by backpropagation written out in numpy."""
    weights = [linear_weight(layer).double().numpy() for layer in net.targets.values()]
    biases = [layer.bias.detach().double().numpy() for layer in net.targets.values()]
    mask = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool().numpy()
    x = batch["inputs"].double().numpy()[mask]
    labels, sequence = batch["labels"].numpy()[mask], np.nonzero(mask)[0]
    h1 = np.tanh(x @ weights[0].T + biases[0])
    h2 = np.tanh(h1 @ weights[1].T + biases[1])
    logits = h2 @ weights[2].T + biases[2]
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g3 = softmax - np.eye(5)[labels]
    g2 = (g3 @ weights[2]) * (1 - h2**2)
    g1 = (g2 @ weights[1]) * (1 - h1**2)
    inputs, gradients = (x, h1, h2), (g1, g2, g3)
    return {
        name: (weights[i], inputs[i], gradients[i], sequence) for i, name in enumerate(net.targets)
    }


@pytest.fixture(params=[nn.Linear, Conv1D], ids=["linear", "conv1d"])
def net(request):
    return Net(request.param)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_second_moments_of_inputs_equal_those_by_hand(net, padded):
    moments, wanted = collect_net(net, [net_batch(padded)]), by_hand(net, net_batch(padded))
    for name, (W, x, _, _) in wanted.items():
        found, image = moments[name].input, x @ W.T if name == "wide" else x
        assert found.is_projected == (name == "wide")
        assert found.size == x.shape[1]
        assert found.squares == pytest.approx((x**2).sum(), rel=1e-5)
        assert found.mean_diagonal == pytest.approx(np.diag(x.T @ x).mean(), rel=1e-5)
        np.testing.assert_allclose(found.matrix, image.T @ image, rtol=1e-4, atol=1e-4)
        assert found.matrix.dtype == torch.float32


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_centred_moments_leave_out_the_mean_of_each_sequence(net, padded):
    moments, wanted = collect_net(net, [net_batch(padded)]), by_hand(net, net_batch(padded))
    for name, (W, x, _, sequence) in wanted.items():
        parts = [x[sequence == s] for s in range(len(LENGTHS))]
        centred = np.concatenate([part - part.mean(0) for part in parts])
        found, image = moments[name].input_centred, centred @ W.T if name == "wide" else centred
        assert found.is_projected == (name == "wide")
        assert found.squares == pytest.approx((centred**2).sum(), rel=1e-5)
        np.testing.assert_allclose(found.matrix, image.T @ image, rtol=1e-4, atol=1e-4)
        assert np.abs(found.matrix.numpy() - moments[name].input.matrix.numpy()).max() > 0.1


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_second_moments_of_gradients_equal_those_by_hand(net, padded):
    moments, wanted = collect_net(net, [net_batch(padded)]), by_hand(net, net_batch(padded))
    for name, (W, _, g, _) in wanted.items():
        found, image = moments[name].output, g @ W if name == "tall" else g
        assert found.is_projected == (name == "tall")
        assert found.size == g.shape[1]
        assert found.squares == pytest.approx((g**2).sum(), rel=1e-5)
        np.testing.assert_allclose(found.matrix, image.T @ image, rtol=1e-4, atol=1e-5)
        assert found.matrix.dtype == torch.float32


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_first_order_statistics_equal_those_by_hand(net, padded):
    moments, wanted = collect_net(net, [net_batch(padded)]), by_hand(net, net_batch(padded))
    for name, (_, x, g, sequence) in wanted.items():
        found = moments[name]
        np.testing.assert_allclose(found.input_abs, np.abs(x).sum(0), rtol=1e-5)
        np.testing.assert_allclose(found.gradient, g.T @ x, rtol=1e-4, atol=1e-5)
        squares = sum(
            ((g[sequence == s].T @ x[sequence == s]) ** 2).sum(1) for s in range(len(LENGTHS))
        )
        np.testing.assert_allclose(found.gradient_rows, squares, rtol=1e-4, atol=1e-6)
        assert np.abs(((g.T @ x) ** 2).sum(1) - squares).max() > 0.1
        assert found.input_abs.dtype == found.gradient_rows.dtype == torch.float32


@pytest.mark.parametrize(("padded", "tokens"), [(False, 28), (True, sum(LENGTHS))])
def test_tokens_and_losses_are_counted(net, padded, tokens):
    for moment in collect_net(net, [net_batch(padded)]).values():
        assert (moment.tokens, moment.losses) == (tokens, tokens)


@pytest.mark.parametrize("needs", [{field} for field in sorted(ALL)], ids=sorted(ALL))
def test_only_what_is_asked_for_is_collected(needs):
    net, batch = Net(), net_batch()
    everything = collect_net(net, [batch])
    for name, moment in collect_net(net, [batch], frozenset(needs)).items():
        for field in ALL:
            found, wanted = getattr(moment, field), getattr(everything[name], field)
            if field not in needs:
                assert found is None
            elif field in SECOND:
                assert torch.allclose(found.matrix, wanted.matrix)
                assert found.squares == pytest.approx(wanted.squares)
            else:
                assert torch.allclose(found, wanted)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_of_any_size_give_the_same_moments(size):
    net, batch = Net(), net_batch()
    assert_equal_moments(collect_net(net, split(batch, size)), collect_net(net, [batch]))


@pytest.mark.parametrize("block", [1, 2, 3])
def test_matrices_summed_in_blocks_are_symmetric_and_the_same(monkeypatch, block):
    whole = collect_net(Net(), [net_batch()])
    monkeypatch.setattr(token_sums, "_BLOCK", block)
    blocks = collect_net(Net(), split(net_batch(), 2))
    assert_equal_moments(blocks, whole)
    for moment in blocks.values():
        for second in (moment.input, moment.output):
            assert torch.equal(second.matrix, second.matrix.T)


@pytest.mark.parametrize(("length", "columns"), [(3, 8), (8, 3)])
def test_squared_rows_of_short_and_long_sequences(length, columns):
    gradients, rows = torch.randn(5, length, 4), torch.randn(5, length, columns)
    wanted = sum((g.T @ x).square().sum(dim=1) for g, x in zip(gradients, rows, strict=True))
    torch.testing.assert_close(token_sums.squared_rows(gradients, rows), wanted)

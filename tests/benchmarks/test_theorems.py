"""The bounds hold on random feed-forward networks, and are not vacuous."""

import math

import pytest
import torch

from benchmarks.theorems import (
    cross_entropy_threshold,
    distance_threshold,
    output_error_bound,
)
from hf_lowrank.errors import ConfigError


def network(seed, depth=3, width=8):
    generator = torch.Generator().manual_seed(seed)
    sizes = [width] * depth + [4]
    return [
        torch.randn(rows, columns, generator=generator, dtype=torch.float64) / columns**0.5
        for rows, columns in zip(sizes[1:], sizes[:-1], strict=True)
    ]


def forward(weights, inputs):
    for weight in weights[:-1]:
        inputs = torch.relu(weight @ inputs)
    return weights[-1] @ inputs


def truncated(weight, rank):
    U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def spectra(weights):
    return [torch.linalg.svdvals(weight).tolist() for weight in weights]


def cut_by(weights, delta):
    """Algorithm 2: keep components with sigma_i / sigma_1 >= delta."""
    ranks = [sum(s >= delta * values[0] for s in values) for values in spectra(weights)]
    return ranks, [truncated(w, k) for w, k in zip(weights, ranks, strict=True)]


@pytest.mark.parametrize("seed", range(100))
def test_theorem_1_bounds_the_output_error(seed):
    weights = network(seed)
    generator = torch.Generator().manual_seed(seed)
    ranks = [int(torch.randint(1, min(w.shape) + 1, (), generator=generator)) for w in weights]
    values = spectra(weights)
    dropped = [([*s, 0.0])[k] for s, k in zip(values, ranks, strict=True)]
    cut = [truncated(w, k) for w, k in zip(weights, ranks, strict=True)]
    x = torch.randn(8, generator=generator, dtype=torch.float64)
    bound = output_error_bound([s[0] for s in values], dropped, float(x.norm()))
    assert float((forward(weights, x) - forward(cut, x)).norm()) <= bound * (1 + 1e-12)


def test_theorem_1_is_reached_by_a_single_layer():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    x = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    error = (weight @ x - truncated(weight, 1) @ x).norm()
    assert float(error) == pytest.approx(output_error_bound([3.0], [2.0], 2.0)) == 4.0


@pytest.mark.parametrize("seed", range(50))
def test_theorem_2_keeps_a_classifier_within_the_tolerance(seed):
    weights = network(seed)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (32,), generator=generator)
    bound = float(inputs.norm(dim=0).max())
    epsilon = 3.0
    delta = cross_entropy_threshold(epsilon, [s[0] for s in spectra(weights)], bound)
    ranks, cut = cut_by(weights, delta)

    def losses(matrices):
        logits = forward(matrices, inputs).T
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    difference = (losses(weights) - losses(cut)).abs()
    assert float(difference.max()) < epsilon
    assert all(rank >= 1 for rank in ranks)


def test_theorem_2_really_cuts_somewhere():
    cuts = []
    for seed in range(50):
        weights = network(seed)
        delta = cross_entropy_threshold(20.0, [s[0] for s in spectra(weights)], 4.0)
        ranks, _ = cut_by(weights, delta)
        cuts.append(sum(min(w.shape) for w in weights) - sum(ranks))
    assert max(cuts) > 0


def test_theorem_3_differs_by_the_root_of_two():
    largest = [2.0, 0.5, 1.5]
    expected = 0.1 / (7.0 * 3 * 1.5)
    assert distance_threshold(0.1, largest, 7.0) == pytest.approx(expected)
    assert cross_entropy_threshold(0.1, largest, 7.0) == pytest.approx(expected / math.sqrt(2))


def test_lipschitz_constants_enter_as_a_product():
    assert output_error_bound([1.0, 1.0], [0.5, 0.0], 1.0, [2.0, 3.0]) == pytest.approx(3.0)
    assert distance_threshold(1.0, [1.0, 1.0], 1.0, [2.0, 3.0]) == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distance_threshold(0.0, [1.0], 1.0), "tolerance must be a number > 0, got 0.0"),
        (
            lambda: distance_threshold(1.0, [1.0], -2.0),
            "input_bound must be a number > 0",
        ),
        (lambda: distance_threshold(1.0, [], 1.0), "one value for each layer"),
        (lambda: distance_threshold(1.0, [0.0], 1.0), "must be > 0 and finite"),
        (lambda: output_error_bound([1.0], [0.1, 0.2], 1.0), "one singular value >= 0"),
        (
            lambda: output_error_bound([1.0], [0.1], math.nan),
            "input_norm must be a number >= 0",
        ),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()

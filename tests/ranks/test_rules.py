"""Scores of the rank rules."""

import numpy as np
import pytest
import torch

from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.rules import RULES
from tests.ranks import spectrum_of

EXAMPLE = spectrum_of((6, 4), [4.0, 2.0, 1.0, 0.0], [0.8, 0.5, 0.1, 0.0])


def test_the_rules_are_those_of_the_documentation():
    assert set(RULES) == {
        "uniform",
        "relative",
        "energy",
        "energy-share",
        "stable-rank",
        "price",
    }


@pytest.mark.parametrize(
    ("rule", "scores"),
    [
        ("uniform", [-10 / 24, -20 / 24, -30 / 24, -40 / 24]),
        ("relative", [1.0, 0.5, 0.25, 0.0]),
        ("energy", [16 / 21, 4 / 21, 1 / 21, 0.0]),
        ("energy-share", [1.0, 5 / 21, 1 / 21, 0.0]),
        ("stable-rank", [-16 / 21, -32 / 21, -48 / 21, -64 / 21]),
        ("price", [0.08, 0.05, 0.01, 0.0]),
    ],
)
def test_scores_by_hand(rule, scores):
    found = RULES[rule](EXAMPLE)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, scores, rtol=1e-12)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_scores_never_rise_with_the_index(rule):
    rng = np.random.default_rng(0)
    for _ in range(20):
        sigma = np.sort(rng.exponential(size=5))[::-1]
        scores = RULES[rule](spectrum_of((5, 7), sigma.tolist(), (0.3 * sigma**2).tolist()))
        assert (scores.diff() <= 0).all()
        assert scores[0] > scores[-1]


@pytest.mark.parametrize("rule", ["relative", "energy"])
def test_a_layer_of_zeros_scores_zero(rule):
    assert RULES[rule](spectrum_of((3, 3), [0.0, 0.0, 0.0])).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rule", ["relative", "energy"])
def test_scores_do_not_depend_on_the_scale_of_a_layer(rule):
    larger = spectrum_of((6, 4), (1000 * EXAMPLE.sigma).tolist())
    np.testing.assert_allclose(RULES[rule](larger), RULES[rule](EXAMPLE), rtol=1e-12)


def test_prices_need_the_metric_that_has_them():
    message = "^rule 'price' needs metric 'kfac', whose singular values are prices.$"
    with pytest.raises(ConfigError, match=message):
        RULES["price"](spectrum_of((2, 2), [1.0, 0.5]))

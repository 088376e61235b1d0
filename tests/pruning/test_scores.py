"""Scores, the choice of survivors and both schedules."""

import itertools
import math

import pytest
import torch

from hf_lowrank.errors import NumericalError
from hf_lowrank.pruning.schedule import density_at, sparse_probability
from hf_lowrank.pruning.scores import add_movement_, choose_masks


def scores():
    return {
        "a": torch.tensor([[9.0, 1.0], [2.0, 3.0]]),
        "b": torch.tensor([[8.0, 7.0, 6.0], [5.0, 4.0, 0.0]]),
    }


def test_movement_is_minus_the_sum_of_gradient_times_weight():
    total = torch.zeros(2, 2)
    steps = [(torch.randn(2, 2), torch.randn(2, 2)) for _ in range(3)]
    for gradient, weight in steps:
        add_movement_(total, gradient, weight)
    torch.testing.assert_close(total, -sum(g * w for g, w in steps))


def test_movement_of_half_precision_is_summed_in_fp32():
    total = torch.zeros(1)
    for _ in range(1000):
        add_movement_(total, torch.tensor([-1.0]).bfloat16(), torch.tensor([0.5]).bfloat16())
    assert float(total) == 500.0


def test_the_layer_scope_keeps_the_share_of_every_matrix():
    masks = choose_masks(scores(), 0.5, "layer")
    assert masks["a"].tolist() == [[True, False], [False, True]]
    assert masks["b"].tolist() == [[True, True, True], [False, False, False]]


def test_the_global_scope_compares_over_the_matrices():
    masks = choose_masks(scores(), 0.5, "global")
    assert masks["a"].tolist() == [[True, False], [False, False]]
    assert masks["b"].tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_number_of_survivors_is_exact_among_equal_scores(scope):
    values = {"a": torch.zeros(10, 10), "b": torch.zeros(5, 20)}
    values["a"][3, 4] = 1.0
    for density in (0.01, 0.3, 0.77, 1.0):
        masks = choose_masks(values, density, scope)
        assert masks["a"][3, 4]
        assert sum(int(mask.sum()) for mask in masks.values()) == round(200 * density)


def test_one_weight_is_always_left():
    assert choose_masks({"a": torch.randn(3, 3)}, 1e-6, "layer")["a"].sum() == 1


def test_scores_that_are_no_numbers_are_refused():
    for bad in (math.nan, math.inf):
        values = scores()
        values["b"][0, 0] = bad
        with pytest.raises(NumericalError, match=r"^b: its pruning scores hold NaN or infinity\.$"):
            choose_masks(values, 0.5, "layer")


def test_the_density_falls_with_the_cube_between_warm_up_and_cool_down():
    densities = [density_at(step, 100, 0.2, 0.1, 0.3) for step in range(101)]
    assert densities[:11] == [1.0] * 11
    assert densities[70:] == [0.2] * 31
    assert densities[40] == pytest.approx(0.2 + 0.8 * 0.5**3)
    assert all(after < before for before, after in itertools.pairwise(densities[10:71]))


def test_the_chance_of_a_sparse_matrix_falls_linearly_to_0():
    chances = [sparse_probability(step, 10, 0.5, 0.6) for step in range(10)]
    assert chances[0] == 0.5
    assert chances[3] == pytest.approx(0.25)
    assert chances[6:] == [0.0] * 4

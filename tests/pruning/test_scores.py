"""Scores, the choice of survivors and both schedules."""

import itertools
import math

import pytest
import torch

from hf_lowrank.errors import NumericalError
from hf_lowrank.pruning.schedule import density_at, sparse_probability
from hf_lowrank.pruning.scores import Magnitude, Movement, Sensitivity, choose_masks


def scores():
    return {
        "a": torch.tensor([[9.0, 1.0], [2.0, 3.0]]),
        "b": torch.tensor([[8.0, 7.0, 6.0], [5.0, 4.0, 0.0]]),
    }


def steps(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and gradients of that many steps."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 2, 3, generator=generator)) for _ in range(size)]


def test_sensitivity_is_the_mean_of_a_window_times_its_usual_deviation():
    found = Sensitivity({"a": torch.zeros(2, 3)})
    mean = deviation = torch.zeros(2, 3)
    for window in (steps(10), steps(4), steps(7)):  # of different lengths
        for weight, gradient in window:
            found.add("a", weight, gradient, 1.0)
        importance = torch.stack([(w * g).abs() for w, g in window]).mean(dim=0)
        mean = 0.85 * mean + 0.15 * importance
        deviation = 0.95 * deviation + 0.05 * (importance - mean).abs()
        torch.testing.assert_close(found.scores({})["a"], mean * deviation)
    assert float((mean * deviation).min()) > 0


def test_half_precision_is_scored_in_fp32():
    one = torch.full((1,), 0.01, dtype=torch.bfloat16)
    found = Sensitivity({"a": one})
    for _ in range(1000):
        found.add("a", one, one, 1.0)
    exact = float(one.float() ** 2)
    assert float(found.state["window"]["a"]) == pytest.approx(1000 * exact, rel=1e-4)
    assert Magnitude({"a": one}).scores({"a": one})["a"].dtype == torch.float32


def test_movement_descends_the_loss_by_its_scores_and_its_l1_term():
    """The gradient of `loss(W * mask(S)) + 400 dropped mean sigma(S)`, straight through."""
    (weight, gradient), (start, _) = steps(2)
    found = Movement({"a": weight, "b": torch.zeros(4, 5)})
    scores = found.state["scores"]["a"]
    with torch.no_grad():
        scores.copy_(start)
    found.add("a", weight, gradient, 0.6)
    mask = start.clone().requires_grad_()
    loss = (gradient * weight * mask).sum() + 400 * 0.4 * mask.sigmoid().mean() / 2
    torch.testing.assert_close(scores.grad, torch.autograd.grad(loss, mask)[0])
    assert torch.equal(found.scores({})["a"], start)


def test_one_threshold_holds_for_all_matrices():
    masks = choose_masks(scores(), 0.5)
    assert masks["a"].tolist() == [[True, False], [False, False]]
    assert masks["b"].tolist() == [[True, True, True], [True, False, False]]


def test_the_number_of_survivors_is_exact_among_equal_scores():
    values = {"a": torch.zeros(10, 10), "b": torch.zeros(5, 20)}
    values["a"][3, 4] = 1.0
    for density in (0.01, 0.3, 0.77, 1.0):
        masks = choose_masks(values, density)
        assert masks["a"][3, 4]
        assert sum(int(mask.sum()) for mask in masks.values()) == round(200 * density)


def test_one_weight_is_always_left():
    assert choose_masks({"a": torch.randn(3, 3)}, 1e-6)["a"].sum() == 1


def test_scores_that_are_no_numbers_are_refused():
    for bad in (math.nan, math.inf):
        values = scores()
        values["b"][0, 0] = bad
        with pytest.raises(
            NumericalError,
            match=r"^b: its pruning scores hold NaN or infinity; lower the learning rate\.$",
        ):
            choose_masks(values, 0.5)


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

"""What each metric reads from the moments, and the moments' own figures."""

import dataclasses

import pytest
import torch

from hf_lowrank.decomposition.metrics import METRICS, QuadraticForm, Side
from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.decomposition.spectrum import decompose
from tests.decomposition import SETTINGS


def moments():
    return Moments(
        input=SecondMoment(2 * torch.eye(3), 6.0, 3),
        input_centred=SecondMoment(3 * torch.eye(3), 9.0, 3),
        output=SecondMoment(torch.eye(2), 2.0, 2),
        input_abs=torch.tensor([8.0, 0.0, 4.0]),
        gradient_rows=torch.tensor([3.0, 0.0]),
        tokens=4,
        losses=5,
    )


def test_the_metrics_are_those_of_the_documentation():
    assert set(METRICS) == {
        "plain", "fisher-rows", "activation-scale", "whitened", "pooled", "kfac", "sparsity",
        "sparsity-whitened",
    }  # fmt: skip


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_a_metric_needs_what_it_says_and_nothing_else(metric):
    needs = METRICS[metric].needs
    assert needs <= {field.name for field in dataclasses.fields(Moments)}
    some = {name: getattr(moments(), name) for name in needs}
    METRICS[metric].form(Moments(**some, tokens=4, losses=5), SETTINGS)
    for missing in needs:
        with pytest.raises(ValueError, match=r"^The metric needs statistics that were not coll"):
            METRICS[metric].form(Moments(**(some | {missing: None}), tokens=4, losses=5), SETTINGS)


def test_plain_is_the_identity():
    assert METRICS["plain"].form(Moments(), SETTINGS) == QuadraticForm(Side(), Side(), None)


def test_fisher_rows_puts_the_row_sums_on_the_output_side():
    form = METRICS["fisher-rows"].form(moments(), SETTINGS)
    assert form.input == Side()
    assert form.price_scale is None
    assert form.output.diagonal.dtype == torch.float64
    assert form.output.diagonal.tolist() == pytest.approx([3 + 1.5e-6, 1.5e-6], rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_activation_scale_puts_the_mean_size_on_the_input_side(alpha):
    form = METRICS["activation-scale"].form(
        moments(), dataclasses.replace(SETTINGS, activation_alpha=alpha)
    )
    assert form.output == Side()
    assert form.price_scale is None
    assert form.input.diagonal.dtype == torch.float64
    # The side's root is the mean to the power of alpha, with a millionth of the average added.
    wanted = [value ** (2 * alpha) for value in (2 + 1e-6, 1e-6, 1 + 1e-6)]
    assert form.input.diagonal.tolist() == pytest.approx(wanted, rel=1e-6)


def test_whitened_reads_the_input_moment_alone():
    given = moments()
    form = METRICS["whitened"].form(given, dataclasses.replace(SETTINGS, input_damping=0.3))
    assert form.output == Side()
    assert form.input.moment is given.input
    assert (form.input.damping, form.input.diagonal) == (0.3, None)
    assert form.price_scale is None


def test_pooled_reads_the_centred_moment_alone():
    given = moments()
    form = METRICS["pooled"].form(given, dataclasses.replace(SETTINGS, input_damping=0.3))
    assert form.output == Side()
    assert form.input.moment is given.input_centred
    assert (form.input.damping, form.price_scale) == (0.3, None)


def test_output_pca_is_the_whitened_metric():
    """LORD projects on the first eigenvectors of the outputs' second moment."""
    generator = torch.Generator().manual_seed(0)
    for m, n in ((5, 8), (8, 5)):
        weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
        x = torch.randn(40, n, generator=generator, dtype=torch.float64)
        second = x.T @ x
        given = Moments(input=SecondMoment(second, float(second.trace()), n), tokens=40)
        form = METRICS["whitened"].form(given, dataclasses.replace(SETTINGS, input_damping=0.0))
        _, factors = decompose(weight, form, dtype=torch.float64)
        basis = torch.linalg.eigh(weight @ second @ weight.T).eigenvectors.flip(1)
        for rank in (1, 3):
            projected = basis[:, :rank] @ basis[:, :rank].T @ weight
            assert torch.allclose(factors.left[:, :rank] @ factors.right[:rank], projected)


def test_kfac_reads_both_moments_and_prices_a_component():
    given = moments()
    form = METRICS["kfac"].form(
        given, dataclasses.replace(SETTINGS, input_damping=0.3, output_damping=0.7)
    )
    assert (form.input.moment, form.input.damping) == (given.input, 0.3)
    assert (form.output.moment, form.output.damping) == (given.output, 0.7)
    assert form.price_scale == 1 / (2 * 4 * 5)


@pytest.mark.parametrize(("strength", "scale"), [(0.0, 0.0), (24.0, 24 / (6 * 2) / (2 * 5))])
def test_kfac_of_evenly_weighted_tokens_has_the_trace_of_the_curvature(strength, scale):
    given = dataclasses.replace(moments(), strength=strength)
    assert METRICS["kfac"].form(given, SETTINGS).price_scale == pytest.approx(scale)


def test_sparsity_counts_survivors_on_the_output_side_and_needs_no_data():
    form = METRICS["sparsity"].form(Moments(), SETTINGS)
    assert form == QuadraticForm(Side(survivors=True), Side(), None)
    assert METRICS["sparsity"].needs == frozenset()


def test_sparsity_whitened_has_the_inputs_of_whitened():
    given, settings = moments(), dataclasses.replace(SETTINGS, input_damping=0.3)
    form = METRICS["sparsity-whitened"].form(given, settings)
    assert form.output == Side(survivors=True)
    assert form.input == METRICS["whitened"].form(given, settings).input
    assert form.price_scale is None


def test_a_projected_moment_keeps_the_mean_diagonal_of_the_vectors_themselves():
    full = SecondMoment(torch.eye(3), 12.0, 3)
    projected = SecondMoment(torch.eye(2), 12.0, 3)
    assert not full.is_projected
    assert projected.is_projected
    assert full.mean_diagonal == projected.mean_diagonal == 4.0

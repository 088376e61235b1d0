"""Correlations of cosines with scores, against scipy's."""

import numpy as np
import pytest

from hf_lowrank.evaluation.similarity import correlations


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, 50).astype(float)  # with ties
    cosines = scores + generator.normal(size=50) ** 3
    cosines[:4] = cosines[4]
    found = correlations(cosines, list(scores))
    assert found.pearson == pytest.approx(stats.pearsonr(cosines, scores)[0], abs=1e-9)
    assert found.spearman == pytest.approx(stats.spearmanr(cosines, scores)[0], abs=1e-9)


def test_constant_cosines_have_no_correlation():
    assert correlations(np.ones(4), [1.0, 2.0, 3.0, 4.0]) == (0.0, 0.0)

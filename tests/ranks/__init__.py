"""Spectra of layers: random ones for properties, and two small ones for plans by hand."""

import numpy as np
import pytest
import torch

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.ranks.rules import RULES

THRESHOLD_RULES = ["energy", "relative", "uniform"]
every_rule = pytest.mark.parametrize("rule", sorted(RULES))


def spectrum_of(shape, sigma, price=None):
    """Singular values, and prices where they are given; the factors are zero."""
    m, n = shape
    sigma = torch.as_tensor(np.array(sigma, dtype=float))
    price = None if price is None else torch.as_tensor(np.array(price, dtype=float))
    return Spectrum((m, n), sigma, price)


def priced_spectrum(shape, sigma, scale=0.01):
    """The same with prices that are the squares times `scale`."""
    return spectrum_of(shape, sigma, scale * np.array(sigma, dtype=float) ** 2)


def random_instance(seed, num_layers=4, largest=9):
    """Shapes and spectra of layers that differ in shape, scale and decay; some have ties."""
    rng = np.random.default_rng(seed)
    shapes, spectra = {}, {}
    for index in rng.permutation(num_layers):
        m, n = (int(size) for size in rng.integers(2, largest + 1, size=2))
        sigma = rng.exponential(size=min(m, n)) * np.exp(-rng.uniform(0, 2) * np.arange(min(m, n)))
        if rng.random() < 0.2:
            sigma[:] = sigma[0]
        sigma = np.sort(sigma * np.exp(rng.normal()))[::-1]
        shapes[f"layer.{index}"] = (m, n)
        spectra[f"layer.{index}"] = priced_spectrum((m, n), sigma)
    return shapes, spectra


def dense_cost(shapes):
    return sum(m * n for m, n in shapes.values())


SHAPES = {"wide": (4, 12), "square": (8, 8)}
SPECTRA = {
    "wide": priced_spectrum((4, 12), [4.0, 2.0, 1.0, 0.5]),
    "square": priced_spectrum((8, 8), [10.0, 8.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1]),
}

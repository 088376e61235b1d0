"""Spectra in a size that fits into a report: a few components of each layer, to be drawn."""

from __future__ import annotations

from collections.abc import Mapping

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.report.sections import LayerSpectrum

MAX_POINTS = 48
_DIGITS = 4


def compact_spectra(spectra: Mapping[str, Spectrum]) -> dict[str, LayerSpectrum]:
    """`Report.spectra`: shape, up to `MAX_POINTS` singular values and the price of their squares.

    The components are those of `shown_components`, so their numbers need not be stored.
    """
    found = {}
    for name, spectrum in spectra.items():
        sigma = spectrum.sigma.tolist()
        largest = sigma[0] if sigma else 0.0
        scale = None
        if spectrum.price is not None and largest > 0:
            scale = _rounded(float(spectrum.price[0]) / largest**2)
        shown = tuple(_rounded(sigma[i]) for i in shown_components(len(sigma)))
        found[name] = LayerSpectrum(spectrum.shape, shown, scale)
    return found


def shown_components(size: int) -> list[int]:
    """Up to `MAX_POINTS` of the components 0 .. size - 1, denser where spectra fall fastest."""
    if size <= MAX_POINTS:
        return list(range(size))
    last = MAX_POINTS - 1
    return sorted({round((size - 1) * (i / last) ** 1.5) for i in range(MAX_POINTS)})


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

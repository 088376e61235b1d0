"""The training form: two factors and the spectrum between them, `W = U diag(s) V`."""

from __future__ import annotations

from hf_lowrank.format.forms.factors import FactorsForm
from hf_lowrank.format.forms.stored_form import register


@register
class UsvForm(FactorsForm):
    """A `LowRankLinear` that also holds s, of shape (k,)."""

    name = "usv"
    tensors = (*FactorsForm.tensors, "lowrank_s")

    def shapes(self, shape: tuple[int, int], entry: int) -> list[tuple[int, ...]]:
        """(k, n), (m, k) and (k,) for a rank k."""
        return [*super().shapes(shape, entry), (entry,)]

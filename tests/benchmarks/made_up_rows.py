"""Rows of a comparison that nobody measured."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from benchmarks.catalogue import select_systems

DENSE = {"in_domain": 3.0, "out_of_domain": 4.0}


def made_up_row(
    name: str, param_ratio: float, rise: float | None, **changes: Any
) -> dict[str, Any]:
    """A measured row whose loss rose by so much in domain, and by twice that out of domain."""
    row: dict[str, Any] = dataclasses.asdict(select_systems([name])[0])
    row |= {"param_ratio": param_ratio, "kept_parameters": int(1000 * param_ratio)}
    row |= {"dense_parameters": 1000, "total_seconds": 2.0, "search_seconds": 1.0}
    row |= {"decompositions": 14, "forwards": 12, "backwards": 0, "peak_mib": 100.0}
    for factor, (text, loss) in enumerate(DENSE.items(), start=1):
        up = None if rise is None else factor * rise
        row[text] = {
            "perplexity_before": math.exp(loss),
            "perplexity_after": None if up is None else math.exp(loss + up),
            "loss_before": loss,
            "loss_after": None if up is None else loss + up,
            "loss_difference": up,
            "standard_error": None if up is None else 0.004,
            "tokens": 100,
        }
    return row


def failed_row(name: str, param_ratio: float) -> dict[str, Any]:
    """A row that could not be measured."""
    row: dict[str, Any] = dataclasses.asdict(select_systems([name])[0])
    return row | {"param_ratio": param_ratio, "error": "a planted failure"}

"""`Report`: what a compression did and what it measured, as data and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_lowrank.version import __version__

_VERSIONED = ("torch", "transformers", "accelerate", "datasets", "safetensors")


@dataclass
class Evaluation:
    """Quality on text that was used neither for calibration nor for choosing ranks.

    Losses are means in nats per scored token; the difference is paired over sequences.
    """

    perplexity_before: float
    perplexity_after: float
    loss_before: float
    loss_after: float
    loss_difference: float
    standard_error: float
    tokens: int


@dataclass
class Report:
    """Result of one compression. The field names are those of `report.json` and stay.

    Attributes:
        model: Name of the dense model.
        config: The settings, see `LowRankConfig`.
        seed: Seed of the run.
        versions: Versions of Python and the libraries.
        parameters: `dense` and `kept` of the whole model (tied weights once), `targeted_dense`
            and `targeted_kept` of the targeted layers' weights.
        bytes: `dense` and `kept`: size of all parameters in their stored type.
        ranks: Rank by layer name, None for dense.
        evaluation: Quality before and after, or None if there was no evaluation text.
        predicted_loss_difference: Sum of the dropped components' prices, nats, or None where the
            metric predicts nothing.
        seconds: Wall time by phase.
        probes: Steps of the search for a loss tolerance.
        held_out: The accepted loss difference on the search's own held-out text, or None.
        recovery: Held-out loss before and after training the factors, and whether that was kept.
        joint: What joint compression accepted (`method`), plain `price` on the same data
            (`baseline`, `baseline_ratio`), and every candidate measured (`trials`).
        failures: Reason by layer name, for layers kept dense because their decomposition failed.
        untouched: Parameters of matrices inside the blocks that were no targets, by name.
        data: Which text was used for what.
    """

    model: str
    config: dict[str, Any]
    seed: int
    versions: dict[str, str]
    parameters: dict[str, int]
    bytes: dict[str, int]
    ranks: dict[str, int | None]
    evaluation: Evaluation | None = None
    predicted_loss_difference: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[str, Any] | None = None
    recovery: dict[str, Any] | None = None
    joint: dict[str, Any] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    untouched: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; numbers that JSON can't hold become null."""
        data: dict[str, Any] = jsonable(dataclasses.asdict(self))
        return data

    def save(self, path: Path) -> None:
        """Writes the report as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version(), "hf-lowrank": __version__}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def jsonable(value: Any) -> Any:  # noqa: ANN401
    """The value with NaN and infinity, which JSON can't hold, turned into None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

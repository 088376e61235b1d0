"""`Report`: what a compression did and what it measured, as data and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from hf_lowrank.errors import DataError
from hf_lowrank.version import __version__

AnyReport = TypeVar("AnyReport", bound="Report")
_VERSIONED = ("torch", "transformers", "accelerate", "datasets", "safetensors")
# A list of numbers, one to a line; a string in JSON holds no line break.
_NUMBERS = re.compile(r"\[\n\s+(-?\d[-+.\deE,\s]*?)\n\s+\]")


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
        ranks: Rank by layer name, None for dense or narrowed.
        narrowed: [out_features, in_features] of the layers that lost channels.
        evaluation: Quality before and after, or None if there was no evaluation text.
        predicted_loss_difference: Sum of the dropped components' prices, nats, or None where the
            metric predicts nothing.
        seconds: Wall time by phase.
        probes: Steps of the search for a loss tolerance.
        held_out: The accepted loss difference on the search's own held-out text, or None.
        recovery: Held-out loss before and after training the factors, and whether that was kept.
        joint: What joint compression accepted (`method`), plain `price` on the same data
            (`baseline`, `baseline_ratio`), every candidate measured (`trials`), and the number of
            matrices decomposed (`decompositions`).
        training: How low-rank training went: `epochs`, `learning_rate`, `rule`, the number of
            `selections`, and their goal: `param_ratio`, or `tolerance` in nats.
        measured_prices: What corrected the prices: for each part its `layers`, the `predicted`
            rise, the `measured` divergence (nats per token) and their `factor`.
        stages: Of a compression in stages, for each its `param_ratio`, the predicted rise of its
            cut in nats (`predicted_loss_difference`), `recovery`, `measured_prices` and `failures`;
            `spectra` and these fields of the report itself are the last stage's.
        failures: Reason by layer name, for layers kept dense because they can't be factorized, or
            because their decomposition failed.
        untouched: Parameters of matrices inside the blocks that were no targets, by name.
        data: Which text was used for what.
        architecture: Class of the model.
        base_model: Hub id of the dense model, or None where it has none.
        spectra: By layer name: `shape` (out, in), `sigma` at a few components in the metric (see
            `compact_spectra`), and `price_scale`: nats per squared sigma, or None.
        speed: `dense` and `compressed`: seconds of each round of `prefill` and `decode`, their
            medians and tokens per second; `settings`: what was timed, and on what. None where it
            was not measured. See `speed_before_and_after`.
        samples: What the dense and the compressed model wrote after a `prompt`: `dense`,
            `compressed`.
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
    training: dict[str, Any] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    untouched: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    architecture: str = ""
    base_model: str | None = None
    spectra: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    samples: list[dict[str, str]] = field(default_factory=list)
    speed: dict[str, Any] | None = None
    narrowed: dict[str, list[int]] = field(default_factory=dict)
    measured_prices: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; numbers that JSON can't hold become null."""
        data: dict[str, Any] = jsonable(dataclasses.asdict(self))
        return data

    def save(self, path: Path) -> None:
        """Writes the report as JSON, each list of numbers on one line."""
        path.write_text(report_text(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls: type[AnyReport], path: Path) -> AnyReport:
        """Reads a report, or the `report.json` of a folder; fields it does not know are left out.

        Raises:
            DataError: There is no such file, or it is no report.
        """
        path = path / "report.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text("utf-8"))
            values = {
                each.name: data[each.name] for each in dataclasses.fields(cls) if each.name in data
            }
            if values.get("evaluation") is not None:
                values["evaluation"] = Evaluation(**values["evaluation"])
            report = cls(**values)
            counts = [*report.parameters.values(), *report.bytes.values()]
            fits = {"dense", "kept", "targeted_dense", "targeted_kept"} <= set(report.parameters)
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror or error}).") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is not a report of hf_lowrank ({error}).") from error
        if not (fits and {"dense", "kept"} <= set(report.bytes)) or not all(
            isinstance(count, int) and count > 0 for count in counts
        ):
            raise DataError(f"{path}: is not a report of hf_lowrank (its sizes are not counts).")
        return report


def report_text(data: dict[str, Any]) -> str:
    """The text of a `report.json`, each list of numbers on one line."""
    text = json.dumps(data, indent=2) + "\n"
    return _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)


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

"""`Report`: what a compression did and what it measured, as data and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hf_lowrank.errors import DataError
from hf_lowrank.ranks.plan import ExpertsPlan
from hf_lowrank.ranks.tolerance import LossDifference, Probe
from hf_lowrank.report.quantization import Quantization, SizeTrial
from hf_lowrank.report.reading import read_section
from hf_lowrank.report.sections import (
    Data,
    Evaluation,
    Hardware,
    Joint,
    LayerSpectrum,
    MeasuredPart,
    Parameters,
    Recovery,
    Sample,
    Settings,
    Sizes,
    Speed,
    Stage,
)
from hf_lowrank.report.training_sections import Training

AnyReport = TypeVar("AnyReport", bound="Report")
# A list of numbers, one to a line; a string in JSON holds no line break.
_ADVICE = "name the report.json that compress wrote."
_NUMBERS = re.compile(r"\[\n\s+(-?\d[-+.\deE,\s]*?)\n\s+\]")


@dataclass
class Report:
    """Result of one compression. The field names are those of `report.json` and stay.

    What did not happen or was not measured is None or empty; sections are explained at their types.

    Attributes:
        model: Name of the dense model.
        versions: Versions of Python and the libraries.
        ranks: Rank by layer name, None for dense or narrowed.
        narrowed: (out_features, in_features) of the layers that lost channels.
        experts: What is left of the fused experts that were targeted, by their name.
        evaluation: Quality before and after, or None if there was no evaluation text.
        foreign_evaluation: The same on a second text, of a kind that calibration saw nothing of.
        predicted_loss_difference: Sum of the dropped components' prices, nats, or None where the
            metric predicts nothing.
        predicted_standard_error: That of the prediction over held-out items, nats; None where the
            prices are not those of held-out text.
        predicted_time: Time of the targeted layers over that of the dense ones, as their shapes
            were timed, by phase; with objective "latency".
        seconds: Wall time by phase.
        probes: Steps of the search for a loss tolerance.
        held_out: The accepted loss difference on the search's own held-out text, or None.
        stages: Of a compression in stages; `spectra`, `recovery`, `measured_prices` and `failures`
            of the report itself are the last stage's.
        failures: Reason by layer name, for layers kept dense because they can't be factorized, or
            because their decomposition failed.
        untouched: Parameters of matrices inside the blocks that were no targets, by name.
        architecture: Class of the model.
        base_model: Hub id of the dense model, or None where it has none.
        spectra: A few components by layer name.
        command: The command line, quoted for a shell; None for a run from Python.
        commit: Commit of hf_lowrank's own checkout, with "-dirty" if it was changed; None where it
            is installed, then `versions` say which it was.
        hardware: What it ran on; None in older reports.
    """

    LOSS_UNIT: ClassVar[str] = "nats per token"

    model: str
    seed: int
    versions: dict[str, str]
    parameters: Parameters
    bytes: Sizes
    ranks: dict[str, int | None]
    config: Settings = field(default_factory=Settings)
    evaluation: Evaluation | None = None
    foreign_evaluation: Evaluation | None = None
    predicted_loss_difference: float | None = None
    predicted_standard_error: float | None = None
    predicted_time: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    held_out: LossDifference | None = None
    recovery: Recovery | None = None
    quantization: Quantization | None = None
    size_trials: list[SizeTrial] = field(default_factory=list)
    joint: Joint | None = None
    training: Training | None = None
    failures: dict[str, str] = field(default_factory=dict)
    untouched: dict[str, int] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    architecture: str = ""
    base_model: str | None = None
    spectra: dict[str, LayerSpectrum] = field(default_factory=dict, repr=False)
    samples: list[Sample] = field(default_factory=list)
    speed: Speed | None = None
    narrowed: dict[str, tuple[int, int]] = field(default_factory=dict)
    experts: dict[str, ExpertsPlan] = field(default_factory=dict)
    measured_prices: list[MeasuredPart] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    command: str | None = None
    commit: str | None = None
    hardware: Hardware | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data; numbers that JSON can't hold become null."""
        data: dict[str, object] = dataclasses.asdict(self)
        data |= {"config": self.config.to_dict(), "data": self.data.to_dict()}
        return {name: jsonable(value) for name, value in data.items()}

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, each list of numbers on one line."""
        Path(path).write_text(report_text(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls: type[AnyReport], path: str | Path) -> AnyReport:
        """Reads a report, or the `report.json` of a folder; fields it does not know are left out.

        Raises:
            DataError: There is no such file, or it is no report.
        """
        path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        try:
            report = read_section(cls, json.loads(path.read_text("utf-8")), "")
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror or error}).") from error
        except ValueError as error:
            raise DataError(
                f"{path}: is not a report of hf_lowrank ({error}); {_ADVICE}"
            ) from error
        counts = dataclasses.astuple(report.parameters) + dataclasses.astuple(report.bytes)
        if min(counts) <= 0:
            raise DataError(
                f"{path}: is not a report of hf_lowrank (its sizes are not counts); {_ADVICE}"
            )
        return report


def report_text(data: Mapping[str, object]) -> str:
    """The text of a `report.json`, each list of numbers on one line."""
    text = json.dumps(data, indent=2) + "\n"
    return _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)


def jsonable(value: Any) -> Any:  # noqa: ANN401
    """The value with NaN and infinity, which JSON can't hold, turned into None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

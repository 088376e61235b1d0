"""The sections of a report: what was kept, measured and searched, each with its units."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from hf_lowrank.config import LowRankConfig
from hf_lowrank.ranks.tolerance import LossDifference
from hf_lowrank.report.reading import read_section
from hf_lowrank.report.training_sections import RankSelection

_NO_SETTINGS = ("ranks", "narrowed", "quantized", "experts")  # decisions, which it has itself


@dataclass(frozen=True)
class Settings:
    """The settings of a run as they were recorded; None where they were not.

    Attributes:
        metric: See `LowRankConfig`, as the next eight.
        rule: By name.
        param_ratio: Kept share of the targeted parameters, the goal.
        loss_tolerance: Rise of the mean loss, nats; the goal.
        megabytes: Of the file, the goal.
        rank: Rank everywhere, the goal.
        channels: Whether feed-forwards may lose channels.
        measured_prices: Whether cuts were priced on held-out text.
        objective: What the size is a share of.
        others: All other settings, also of other versions, by name.
    """

    metric: str | None = None
    rule: str | None = None
    param_ratio: float | None = None
    loss_tolerance: float | None = None
    megabytes: float | None = None
    rank: int | None = None
    channels: bool | None = None
    measured_prices: bool | None = None
    objective: str | None = None
    others: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, config: LowRankConfig) -> Settings:
        """The settings of a config, without the ranks and shapes that it may hold."""
        given = {k: v for k, v in config.to_dict().items() if k not in _NO_SETTINGS}
        return read_section(cls, given, "config")

    def to_dict(self) -> dict[str, object]:
        """The settings that are not None, by name."""
        return _given({k: v for k, v in vars(self).items() if k != "others"} | self.others)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        dense: Of the whole dense model, tied weights once.
        kept: Of the whole compressed model.
        targeted_dense: Of the targeted layers' weights in the dense model.
        targeted_kept: What is left of those.
    """

    dense: int
    kept: int
    targeted_dense: int
    targeted_kept: int

    @property
    def share(self) -> float:
        """Kept share of the whole model."""
        return self.kept / self.dense

    @property
    def targeted_share(self) -> float:
        """Kept share of the targeted layers' weights."""
        return self.targeted_kept / self.targeted_dense


@dataclass(frozen=True)
class Sizes:
    """Bytes of all parameters in their stored type: of the dense and of the compressed model."""

    dense: int
    kept: int

    @property
    def share(self) -> float:
        """Kept share."""
        return self.kept / self.dense


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Recovery:
    """What training after a cut did.

    Attributes:
        loss_before: Held-out loss after the cut, nats per token.
        loss_after: The same after the training.
        accepted: Whether the trained factors were kept.
        steps: Optimizer steps.
        kind: What was trained, "factors" or "lora".
    """

    loss_before: float
    loss_after: float
    accepted: bool
    steps: int
    kind: str = "factors"


@dataclass(frozen=True)
class MeasuredPart:
    """A part of the model whose cuts were priced again on held-out text.

    Attributes:
        layers: Their names.
        predicted: Rise of the loss by the prices of the calibration text, nats per token.
        measured: The same by those of held-out text.
        factor: The latter over the former.
    """

    layers: tuple[str, ...]
    predicted: float
    measured: float
    factor: float


@dataclass(frozen=True)
class Stage:
    """One cut of a compression in stages.

    Attributes:
        param_ratio: Kept share of the targeted parameters after it.
        predicted_loss_difference: Rise of the loss by the prices, nats, over the model that the
            stage before left; None where the metric predicts nothing.
        recovery: The training after it.
        measured_prices: How the prices of its parts came out on held-out text.
        failures: Reason by layer name, of layers that stayed dense.
    """

    param_ratio: float
    predicted_loss_difference: float | None
    recovery: Recovery | None
    measured_prices: list[MeasuredPart] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial(LossDifference):
    """One candidate of joint compression, and its loss difference on the acceptance set.

    Attributes:
        name: Of the candidate.
        param_ratio: Kept share of the targeted parameters.
    """

    name: str
    param_ratio: float


@dataclass(frozen=True)
class Joint:
    """What joint compression tried and accepted.

    Attributes:
        method: Name of the accepted candidate.
        baseline: Rise of the loss of plain `price` on the same data.
        baseline_ratio: Kept share of the targeted parameters there.
        trials: Every candidate measured; one that was clearly worse than the best before all items
            were read is not `complete`.
        decompositions: Matrices decomposed, corrections included; None in older reports.
    """

    method: str
    baseline: LossDifference
    baseline_ratio: float
    trials: list[Trial]
    decompositions: int | None = None


@dataclass(frozen=True)
class LayerSpectrum:
    """A few components of a layer.

    Attributes:
        shape: (out_features, in_features) of the dense layer.
        sigma: Singular values in the metric, see `compact_spectra`.
        price_scale: Nats per squared sigma; None where the metric gives no price.
    """

    shape: tuple[int, int]
    sigma: tuple[float, ...]
    price_scale: float | None


@dataclass(frozen=True)
class Timing:
    """Times of one model.

    Attributes:
        prefill: Seconds to read the prompts, one of each round.
        decode: Seconds to read the new tokens one by one, one of each round.
        prefill_seconds: Median.
        decode_seconds: Median.
        prefill_tokens_per_second: By the median.
        decode_tokens_per_second: By the median.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class SpeedConditions:
    """What was timed, the fields of `SpeedSettings`, and where.

    Attributes:
        rounds: Rounds that were counted.
        device: torch's name of the device.
        hardware: The processor's or the accelerator's name.
        threads: Threads of torch on the processor.
        dtype: Type of the weights.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    seed: int
    max_seconds: float | None
    rounds: int
    device: str
    hardware: str
    threads: int
    dtype: str


@dataclass(frozen=True)
class Speed:
    """Times of the dense and of the compressed model, taken in turn."""

    dense: Timing
    compressed: Timing
    settings: SpeedConditions


@dataclass(frozen=True)
class Sample:
    """What the dense and the compressed model wrote after a prompt."""

    prompt: str
    dense: str
    compressed: str


@dataclass(frozen=True)
class Data:
    """Which text was used for what; None where there was none, or it is not known.

    Attributes:
        calibration: Source of the calibration text.
        calibration_tokens: Tokens read of it.
        train: Source of the training text.
        train_tokens: Tokens in it.
        evaluation: Source of the evaluation text.
        foreign: Source of the second text, of a kind that calibration saw nothing of.
        start_token: What every window begins with, where the tokenizer adds a start token.
        selections: What each rank selection did in low-rank training.
    """

    calibration: str | None = None
    calibration_tokens: int | None = None
    train: str | None = None
    train_tokens: int | None = None
    evaluation: str | None = None
    foreign: str | None = None
    start_token: str | None = None
    selections: list[RankSelection] | None = None

    def to_dict(self) -> dict[str, object]:
        """What is not None."""
        return _given(dataclasses.asdict(self))


@dataclass(frozen=True)
class Hardware:
    """What a run ran on.

    Attributes:
        processor: Name of the processor.
        cpus: Its logical cores.
        threads: Threads that torch used on it.
        accelerator: Name of the accelerator that the process used, or None.
    """

    processor: str
    cpus: int | None
    threads: int
    accelerator: str | None = None


def _given(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}

"""What to compress and how, and afterwards what was decided: `LowRankConfig`.

The config is plain data. It is written into `config.json` as `quantization_config`, so a run can
be replayed from a checkpoint. Each option is documented once, in the `help` of its field; the
command line reads its help texts from here.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lowrank.errors import CheckpointError, ConfigError
from hf_lowrank.format.forms.stored_form import form_names
from hf_lowrank.format.layout import FORMAT_VERSION, QUANT_METHOD, Layout, check_version
from hf_lowrank.value_checks import (
    check_between,
    check_choice,
    check_count,
    check_flag,
    check_goal_values,
    check_not_negative,
    check_ranks,
    check_read,
    check_seed,
    listed_names,
)

METRIC_NAMES = (
    "plain",
    "fisher-rows",
    "activation-scale",
    "whitened",
    "pooled",
    "kfac",
    "sparsity",
    "sparsity-whitened",
)
RULE_NAMES = ("uniform", "relative", "energy", "energy-share", "stable-rank", "price")
OBJECTIVES = (None, "parameters", "latency")
LABEL_SOURCES = ("data", "model")
WEIGHT_TYPES = (None, "int8", "int4")
DEFAULT_LOSS_TOLERANCE = 0.05
DEFAULT_FORM = "compact"
_GOALS = ("param_ratio", "loss_tolerance", "megabytes", "rank")
_TRADING_GOALS = _GOALS[:-1]
_RETIRED = ("search_trials",)  # in checkpoints of older versions, and read no more
# Settings that not every run reads: which choice decides, and with which choices they are read.
# Elsewhere a value other than the default would do nothing, and is refused.
READERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rule": ("goal", _TRADING_GOALS),
    "min_rank": ("goal", _TRADING_GOALS),
    "channels": ("goal", _TRADING_GOALS),
    "channels_only": ("goal", ("param_ratio", "loss_tolerance")),
    "measured_prices": ("goal", _TRADING_GOALS),
    "objective": ("goal", ("param_ratio", "loss_tolerance")),
    "input_damping": ("metric", ("whitened", "pooled", "kfac", "sparsity-whitened")),
    "output_damping": ("metric", ("kfac",)),
    "activation_alpha": ("metric", ("activation-scale",)),
    "label_source": ("metric", ("fisher-rows", "kfac")),
}


def option(default: Any, help: str) -> Any:  # noqa: ANN401
    """A dataclass field whose help text also serves the command line."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(
            default_factory=lambda: copy.copy(default), metadata={"help": help}
        )
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(kw_only=True, repr=False)
class LowRankConfig(QuantizationConfigMixin):
    """Settings of a compression, and its result once `ranks` is filled.

    Give at most one goal: `param_ratio`, `loss_tolerance`, `megabytes` or `rank`. Without one the
    goal is a loss tolerance of 0.05 nats per token. The fields' help texts say what each means.

    A setting that the others leave nothing to do is refused (`READERS`), unless `ranks` are given:
    then the config is a record, as it stands in a checkpoint, and is replayed.

    Raises:
        ConfigError: A value is out of range, two settings contradict each other, or one would do
            nothing.
    """

    param_ratio: float | None = option(
        None,
        "Goal: parameters to keep, as a share of the targeted layers' dense parameters (never of "
        "embeddings or heads), in (0, 1]. The kept count never exceeds it.",
    )
    loss_tolerance: float | None = option(
        None,
        "Goal: largest rise of the mean loss on held-out calibration text, in nats per token; the "
        f"smallest model within it is returned. The default goal, {DEFAULT_LOSS_TOLERANCE}.",
    )
    megabytes: float | None = option(
        None,
        "Goal: largest size of model.safetensors, 10^6 bytes. Ranks and, where weights is left "
        "open, the types of the weights are chosen: by rule price for each layer, with other rules "
        "for all together by what does best on held-out text.",
    )
    rank: int | None = option(None, "Goal: one rank for every targeted layer.")
    metric: str = option(
        "kfac",
        "What the truncation error of a weight is measured in: " + ", ".join(METRIC_NAMES) + ".",
    )
    rule: str | None = option(
        None,
        "How one threshold chooses the ranks: " + ", ".join(RULE_NAMES) + ". Default: price with "
        "the kfac metric (the only one it works with), uniform with the others.",
    )
    channels: bool | None = option(
        None,
        "Let feed-forwards lose channels, too: each is narrowed or its layers are factorized, "
        "whichever the prices favour; fused experts of a mixture are narrowed or "
        "dropped. Needs metric kfac and rule price, and is then the default on "
        "causal language models.",
    )
    channels_only: bool | None = option(
        None,
        "Take out channels and factorize nothing, for engines that only know dense layers; sets "
        "channels.",
    )
    measured_prices: bool | None = option(
        None,
        "Take the prices of cuts from held-out text: what they do to the loss there by a few "
        "backward passes. Needs metric kfac and rule price, and is then the default on causal "
        "language models.",
    )
    objective: str | None = option(
        None,
        "What param_ratio is a share of: 'parameters', or 'latency', the targeted layers' time as "
        "timed on this machine. Default: parameters.",
    )
    target_modules: list[str] | None = option(
        None,
        "Layers to factorize: module names, trailing parts of names (q_proj), or patterns with * "
        "(model.layers.3.*). Default: every linear layer inside the transformer blocks.",
    )
    exclude_modules: list[str] | None = option(
        None, "Layers to keep dense, written like target_modules."
    )
    rank_pattern: dict[str, int | None] = option(
        {},
        "Ranks fixed by hand for some layers, {name or pattern: rank, or null for dense}; they "
        "count towards the goal.",
    )
    min_rank: int = option(1, "Smallest rank that a factorized layer may get.")
    input_damping: float = option(
        0.01, "Share of its mean diagonal added to each input second moment before its root."
    )
    output_damping: float = option(
        0.1, "Share of its mean diagonal added to each output-gradient second moment."
    )
    activation_alpha: float = option(
        0.5, "Exponent of the mean absolute input in the activation-scale metric."
    )
    label_source: str = option(
        "data",
        "Labels behind the loss gradients of the kfac and fisher-rows metrics: 'data' uses the "
        "text or the dataset's labels, 'model' samples them from the model's own predictions.",
    )
    weights: str | None = option(
        None,
        "Store the weights of all targeted layers as int8 or int4 (torchao). Default: as they are.",
    )
    seed: int = option(0, "Seed of everything random.")
    ranks: dict[str, int | None] | None = option(
        None, "The decision: rank of every targeted layer, null for dense. Filled by compress()."
    )
    narrowed: dict[str, list[int]] | None = option(
        None,
        "The decision: [out_features, in_features] of layers that lost channels, by compress().",
    )
    quantized: dict[str, dict[str, Any]] | None = option(
        None,
        "The decision: bits and block of every quantized matrix. Filled by compress().",
    )
    experts: dict[str, dict[str, int]] | None = option(
        None,
        "The decision: experts and width left of fused experts that lost some, by compress().",
    )
    form: str | None = option(
        None,
        "How a layer of rank k is stored: 'compact', k (m + n - k) numbers; 'factors', B A, "
        "k (m + n); or 'usv', U s V, in training. A size counts what is stored. Default: "
        f"{DEFAULT_FORM}.",
    )
    format_version: int = option(FORMAT_VERSION, "Version of the checkpoint layout.")
    quant_method: str = option(QUANT_METHOD, "Fixed: tells transformers how to load.")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks every value; see the class docstring."""
        self._check_goal()
        check_flag("channels_only", self.channels_only)
        self.channels = True if self.channels_only and self.channels is None else self.channels
        check_choice("metric", self.metric, METRIC_NAMES)
        check_choice("label_source", self.label_source, LABEL_SOURCES)
        check_choice("form", self.form, (None, *form_names()))
        check_choice("weights", self.weights, WEIGHT_TYPES)
        check_choice("objective", self.objective, OBJECTIVES)
        if self.rule is not None:
            if self.ranks is None:  # a record may name one that is no more
                check_choice("rule", self.rule, RULE_NAMES)
            if self.rule == "price" and self.metric != "kfac":
                raise ConfigError(
                    f"rule 'price' needs metric 'kfac', whose singular values are prices; got "
                    f"metric {self.metric!r}. Choose another rule or metric 'kfac'."
                )
        for name in ("channels", "measured_prices"):
            self._check_prices(name)
        if self.objective == "latency" and (self.effective_rule != "price" or self.weights):
            raise ConfigError(
                f"objective 'latency' needs rule 'price' and no type of weights; got rule "
                f"{self.effective_rule!r} and weights {self.weights!r}. Leave out one or the other."
            )
        for name in ("input_damping", "output_damping"):
            check_not_negative(name, getattr(self, name))
        check_between("activation_alpha", self.activation_alpha, "[0, 1]")
        check_count("min_rank", self.min_rank)
        check_seed(self.seed)
        self.target_modules = listed_names("target_modules", self.target_modules)
        self.exclude_modules = listed_names("exclude_modules", self.exclude_modules)
        check_ranks("rank_pattern", self.rank_pattern)
        check_ranks("ranks", {} if self.ranks is None else self.ranks)
        self._check_decision()
        has_ranks = self.min_rank != 1 or any(self.rank_pattern.values())
        if self.channels_only and (has_ranks or self.channels is False):
            raise ConfigError(
                "channels_only gives no layer a rank; leave out channels, min_rank, rank_pattern."
            )
        if self.ranks is None:
            self._check_readers()
            if self.form == "usv":
                raise ConfigError(
                    "form 'usv' is that of layers in training, as LowRankTrainer writes it; set "
                    "form to 'compact' or 'factors'."
                )

    def _check_readers(self) -> None:
        choices = {"goal": self.goal, "metric": self.metric}
        for name, (kind, readers) in READERS.items():
            value = getattr(self, name)
            is_given = value != _FIELDS[name].default and value is not False
            if is_given:
                check_read(name, value, kind, choices[kind], readers)

    def _check_prices(self, name: str) -> None:
        value = getattr(self, name)
        check_flag(name, value)
        if value and (self.metric, self.effective_rule) != ("kfac", "price"):
            raise ConfigError(
                f"{name} works on prices, which need metric 'kfac' and rule 'price'; got metric "
                f"{self.metric!r} and rule {self.effective_rule!r}."
            )

    def _check_decision(self) -> None:
        try:
            Layout.from_settings(self.to_dict() | {"ranks": self.ranks or {}})
        except CheckpointError as error:
            raise ConfigError(str(error)) from None

    def _check_goal(self) -> None:
        goals = [name for name in _GOALS if getattr(self, name) is not None]
        if len(goals) > 1:
            raise ConfigError(f"Give one goal, not {len(goals)}: {' and '.join(goals)} are set.")
        check_goal_values(self.param_ratio, self.loss_tolerance, self.megabytes)
        if self.rank is not None:
            check_count("rank", self.rank)

    @property
    def effective_rule(self) -> str:
        """The rule in force: `rule`, or the metric's default."""
        return self.rule or ("price" if self.metric == "kfac" else "uniform")

    @property
    def goal(self) -> str:
        """Name of the goal that is set, "loss_tolerance" by default."""
        return next((name for name in _GOALS if getattr(self, name) is not None), _GOALS[1])

    @property
    def inference_form(self) -> str:
        """The form of layers that are not in training: `form`, or compact."""
        return DEFAULT_FORM if self.form in (None, "usv") else str(self.form)

    @property
    def searches(self) -> bool:
        """Whether something is measured on held-out data to find the plan."""
        if self.goal == "loss_tolerance":
            return True
        if self.goal == "megabytes" and self.weights is None and self.effective_rule != "price":
            return True
        return bool(self.measured_prices)

    @property
    def effective_tolerance(self) -> float:
        """The loss tolerance in force, nats per token."""
        return DEFAULT_LOSS_TOLERANCE if self.loss_tolerance is None else self.loss_tolerance

    def replace(self, **changes: Any) -> LowRankConfig:
        """A checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:  # noqa: ANN401
        """Reads the `quantization_config` of a checkpoint.

        Raises:
            CheckpointError: The format is newer than this library or a field is unknown.
        """
        check_version(config_dict.get("format_version"))
        settings = {k: v for k, v in config_dict.items() if k not in _RETIRED}
        unknown = sorted(settings.keys() - _FIELDS.keys())
        if unknown:
            raise CheckpointError(
                f"config.json has unknown low-rank settings {', '.join(unknown)}; it was written "
                "by another version of hf_lowrank or edited by hand."
            )
        old = {"form": "factors"} if config_dict["format_version"] == 1 else {}
        config = cls(**old | settings)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """All settings that are not None, as plain JSON data."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return copy.deepcopy({name: value for name, value in values.items() if value is not None})


_FIELDS = {field.name: field for field in dataclasses.fields(LowRankConfig)}


def config_option(name: str, **overrides: Any) -> Any:  # noqa: ANN401
    """A dataclass field with the default and the help text of a `LowRankConfig` field."""
    source = _FIELDS[name]
    settings: dict[str, Any] = {"metadata": dict(source.metadata)}
    if source.default is not dataclasses.MISSING:
        settings["default"] = source.default
    return dataclasses.field(**(settings | overrides))

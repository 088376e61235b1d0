"""What `LowRankTrainingArguments` refuses, and in which words."""

from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from hf_lowrank.errors import ConfigError
from hf_lowrank.training.training_arguments import LowRankTrainingArguments
from tests.training import arguments


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("orthogonality_weight", -1.0, r"orthogonality_weight must be a number >= 0, got -1\.0"),
        ("rank_penalty_weight", float("nan"), "rank_penalty_weight must be a number >= 0, got nan"),
        ("selection_tolerance", 0.0, r"selection_tolerance must be > 0, got 0\.0"),
        ("selection_precision", 1.0, r"selection_precision must lie in \(0, 1\), got 1\.0"),
        ("target_param_ratio", 1.5, r"target_param_ratio must lie in \(0, 1\], got 1\.5"),
        ("smallest_ratio", 0.0, r"smallest_ratio must lie in \(0, 1\], got 0\.0"),
        ("selection_samples", -1, "selection_samples must be >= 0, got -1"),
        ("selection_steps", -2, "selection_steps must be >= 0, got -2"),
        ("rank_penalty", "l0", "rank_penalty must be one of hoyer, nuclear, none; got 'l0'"),
        ("selection_rule", "energy", "selection_rule must be one of relative, price; got 'energy'"),
        ("tolerance_reference", "dense", "must be one of start, best, current; got 'dense'"),
        ("break_even", "cut", "break_even must be one of wait, dense; got 'cut'"),
    ],
)
def test_a_value_out_of_range(field: str, value: Any, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, **{field: value})


def test_sharded_training_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="FSDP's sharded parameters do not allow"):
        arguments(tmp_path, fsdp="full_shard")


def test_every_added_field_has_a_help_text_on_the_command_line(tmp_path: Path):
    parser = HfArgumentParser(LowRankTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--target_param_ratio", "0.4", "--selection_rule", "price",
         "--use_cpu", "true"]
    )  # fmt: skip
    assert (parsed.target_param_ratio, parsed.selection_rule) == (0.4, "price")
    helps = {action.dest: action.help for action in parser._actions}
    assert "nats" in helps["selection_tolerance"]

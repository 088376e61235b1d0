"""What `LowRankTrainingArguments` refuses, and in which words."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.training.training_arguments import LowRankTrainingArguments, check_lowrank_config
from tests.tiny_models import tiny_bert_classifier
from tests.training import arguments, sentence_rows, settings, trainer_for


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("orthogonality_weight", -1.0, r"orthogonality_weight must be a number >= 0, got -1\.0"),
        ("rank_penalty_weight", float("nan"), "rank_penalty_weight must be a number >= 0, got nan"),
        ("selection_tolerance", 0.0, r"selection_tolerance must be a number > 0, got 0\.0"),
        ("selection_precision", 1.0, r"selection_precision must lie in \(0, 1\), got 1\.0"),
        ("target_param_ratio", 1.5, r"target_param_ratio must lie in \(0, 1\], got 1\.5"),
        ("smallest_ratio", 0.0, r"smallest_ratio must lie in \(0, 1\], got 0\.0"),
        ("selection_samples", -1, "selection_samples must be an integer >= 0, got -1"),
        ("selection_steps", -2, "selection_steps must be an integer >= 0, got -2"),
        ("rank_penalty", "l0", "rank_penalty must be one of hoyer, nuclear, none; got 'l0'"),
        ("selection_rule", "energy", "selection_rule must be one of price, relative; got 'energy'"),
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


def test_the_default_rule_is_the_better_one(tmp_path: Path):
    assert LowRankTrainingArguments(**settings(tmp_path)).selection_rule == "price"


# Settings of a LowRankConfig


@pytest.mark.parametrize(
    ("ignored", "advice"),
    [
        ({"param_ratio": 0.3}, "Set target_param_ratio in LowRankTrainingArguments instead."),
        ({"loss_tolerance": 0.1}, "Set selection_tolerance in LowRankTrainingArguments instead."),
        ({"rank": 4}, "Set rank_pattern instead."),
        ({"metric": "whitened"}, "Set selection_rule in LowRankTrainingArguments instead."),
        ({"rule": "energy"}, "Set selection_rule in LowRankTrainingArguments instead."),
        ({"min_rank": 4}, "Set smallest_ratio in LowRankTrainingArguments instead."),
        ({"label_source": "model"}, "Set selection_labels in LowRankTrainingArguments instead."),
        ({"seed": 3}, "Set seed in LowRankTrainingArguments instead."),
        ({"channels": True}, "It is for compress; leave it out."),
        ({"measured_prices": True}, "It is for compress; leave it out."),
    ],
    ids=str,
)
def test_a_setting_that_training_would_ignore(ignored: Any, advice: str, tmp_path: Path):
    ((name, value),) = ignored.items()
    args = arguments(tmp_path, selection_rule="price")
    message = f"LowRankTrainer would ignore {name}={value!r} of its lowrank_config. {advice}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_lowrank_config(LowRankConfig(**ignored), args, is_compressed=False)


def test_the_trainer_refuses_before_it_changes_the_model(tmp_path: Path):
    model = tiny_bert_classifier()
    config = LowRankConfig(param_ratio=0.3, metric="whitened", min_rank=4, input_damping=5.0)
    with pytest.raises(ConfigError, match=r"ignore param_ratio=0\.3 of its lowrank_config"):
        trainer_for(model, sentence_rows(), tmp_path, lowrank_config=config)
    assert not factorized_layers(model)


@pytest.mark.parametrize("name", ["input_damping", "output_damping"])
def test_damping_is_read_with_prices_alone(name: str, tmp_path: Path):
    config = LowRankConfig(**{name: 0.5})
    args = arguments(tmp_path, selection_rule="price")
    check_lowrank_config(config, args, is_compressed=False)
    with pytest.raises(ConfigError, match=rf"{name}=0\.5 .* Set selection_rule='price', which"):
        check_lowrank_config(config, arguments(tmp_path), is_compressed=False)
    found: list[list[torch.Tensor]] = []
    for lowrank_config in (LowRankConfig(target_modules=["query"]), config):
        trainer = trainer_for(
            tiny_bert_classifier(), sentence_rows(), tmp_path, selection_rule="price",
            lowrank_config=lowrank_config.replace(target_modules=["query"]),
        )  # fmt: skip
        selection = trainer.select_ranks()
        found.append([factors.left for factors in selection.factors.values()])
    assert not any(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "setting", [{"target_modules": ["q"]}, {"exclude_modules": ["q"]}, {"rank_pattern": {"q": 2}}]
)
def test_layers_are_chosen_in_a_dense_model_alone(setting: Any, tmp_path: Path):
    config, args = LowRankConfig(**setting), arguments(tmp_path)
    check_lowrank_config(config, args, is_compressed=False)
    with pytest.raises(ConfigError, match=r"ignore .*'q'.* has low-rank layers already"):
        check_lowrank_config(config, args, is_compressed=True)


def test_the_record_of_a_cut_goes_with_the_model_that_was_cut(tmp_path: Path):
    record, args = LowRankConfig(param_ratio=0.5, seed=3, ranks={"a": 3}), arguments(tmp_path)
    check_lowrank_config(record, args, is_compressed=True)
    with pytest.raises(ConfigError, match=r"starts a dense model at full rank and does not read"):
        check_lowrank_config(record, args, is_compressed=False)

"""Command-line arguments: their help, their defaults, and what becomes of mistakes."""

import dataclasses
import io
import sys
import typing
from collections.abc import Callable
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import HfArgumentParser

from hf_lowrank import errors
from hf_lowrank.cli.arguments import (
    SAMPLE_PROMPTS,
    CompressionArguments,
    PublishingArguments,
    parse_several,
    user_errors,
)
from hf_lowrank.cli.encoder_arguments import EncoderArguments
from hf_lowrank.compression.options import RunOptions
from hf_lowrank.compression.recovery import RECOVERIES
from hf_lowrank.config import LowRankConfig, config_option, option
from hf_lowrank.errors import ConfigError, LowRankError

CONFIG_FIELDS = {field.name: field for field in dataclasses.fields(LowRankConfig)}
ARGUMENT_FIELDS = {field.name: field for field in dataclasses.fields(CompressionArguments)}
# Settings for library users and checkpoints; a new one must be put here or on the command line.
NOT_ON_THE_COMMAND_LINE = {
    "rank",
    "rank_pattern",
    "min_rank",
    "input_damping",
    "output_damping",
    "activation_alpha",
    "ranks",
    "narrowed",
    "quantized",
    "experts",
    "format_version",
    "quant_method",
}
PROMISED = {
    "model": str,
    "param_ratio": list[float] | None,
    "loss_tolerance": float | None,
    "metric": str,
    "rule": str | None,
    "target_modules": list[str] | None,
    "exclude_modules": list[str] | None,
    "calibration": str | None,
    "calibration_sequences": int,
    "sequence_length": int,
    "evaluation": str | None,
    "evaluation_sequences": int,
    "dtype": str,
    "device": str,
    "output_dir": str | None,
    "seed": int,
    "cache_dir": str | None,
}


def parse(*arguments: str) -> CompressionArguments:
    parser = HfArgumentParser(CompressionArguments)
    (parsed,) = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    assert isinstance(parsed, CompressionArguments)
    return parsed


# Options


def test_every_promised_option_is_there_with_its_type():
    types = typing.get_type_hints(CompressionArguments)
    assert {name: types[name] for name in PROMISED} == PROMISED


def test_every_setting_of_the_config_is_an_option_or_left_out_on_purpose():
    assert set(CONFIG_FIELDS) - set(ARGUMENT_FIELDS) == NOT_ON_THE_COMMAND_LINE


@pytest.mark.parametrize("name", sorted(set(CONFIG_FIELDS) & set(ARGUMENT_FIELDS)))
def test_options_of_the_config_have_its_default_and_its_help(name: str):
    assert ARGUMENT_FIELDS[name].default == CONFIG_FIELDS[name].default
    assert ARGUMENT_FIELDS[name].metadata == CONFIG_FIELDS[name].metadata


def test_a_default_can_be_overridden_without_changing_the_config():
    field = config_option("metric", default="plain")
    assert field.default == "plain"
    assert field.metadata["help"] == CONFIG_FIELDS["metric"].metadata["help"]
    assert LowRankConfig().metric == "kfac"


def test_an_argument_has_a_default_and_a_help_text():
    field = option(3, "Threes.")
    assert (field.default, field.metadata["help"]) == (3, "Threes.")


def test_a_setting_that_the_config_does_not_have():
    with pytest.raises(KeyError, match="no_such_setting"):
        config_option("no_such_setting")


# to_config


def test_without_arguments_the_config_is_the_default_one():
    assert parse().to_config() == LowRankConfig()
    assert parse().to_config().goal == "loss_tolerance"


def test_settings_reach_the_config():
    given = (
        "--param_ratio 0.7 --metric fisher-rows --rule energy --target_modules q_proj v_proj "
        "--exclude_modules layers.0.* --label_source model --seed 5"
    )
    assert parse(*given.split()).to_config() == LowRankConfig(
        param_ratio=0.7,
        metric="fisher-rows",
        rule="energy",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["layers.0.*"],
        label_source="model",
        seed=5,
    )


def test_a_tolerance_reaches_the_config():
    assert parse("--loss_tolerance", "0.2").to_config() == LowRankConfig(loss_tolerance=0.2)


def test_the_first_of_several_ratios_stands_for_all():
    assert parse("--param_ratio", "0.7", "0.4").to_config() == LowRankConfig(param_ratio=0.7)


@pytest.mark.parametrize("ratios", [("1.5",), ("0.5", "0"), ("0.5", "0.4", "-1"), ("nan", "0.5")])
def test_each_ratio_is_checked(ratios: tuple[str, ...]):
    bad = next(float(ratio) for ratio in ratios if not 0 < float(ratio) <= 1)
    with pytest.raises(ConfigError, match=rf"must lie in \(0, 1\], got {bad}\."):
        parse("--param_ratio", *ratios).to_config()


@pytest.mark.parametrize("ratios", [("0.5",), ("0.5", "0.4")])
def test_both_goals_at_once(ratios: tuple[str, ...]):
    with pytest.raises(ConfigError, match="Give one goal, not 2: param_ratio and loss_tolerance"):
        parse("--param_ratio", *ratios, "--loss_tolerance", "0.1").to_config()


# text_source


WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"


@pytest.mark.parametrize(
    ("role", "demo", "other"),
    [
        ("calibration", "demo + demo-graphs:0.25", WIKITEXT),
        ("held_out", "demo + demo-graphs:0.25", WIKITEXT),
        ("evaluation", "demo", WIKITEXT),
        ("foreign", "demo-licenses", "allenai/c4:en:validation"),
    ],
)
def test_texts_by_default(role: str, demo: str, other: str):
    assert parse().text_source(role) == demo
    assert parse("--model", "gpt2").text_source(role) == other


@pytest.mark.parametrize(
    ("calibration", "foreign"),
    [
        ("a.txt", "demo-licenses"),
        ("a.txt + demo-licenses:0.5", "demo-graphs"),
        ("demo-licenses + demo-graphs", "demo"),
        ("demo-licenses + demo-graphs + demo", "none"),
    ],
)
def test_the_foreign_text_is_none_that_calibration_read(calibration: str, foreign: str):
    chosen = parse("--model", "gpt2", "--calibration", calibration, "--evaluation", "b.txt")
    assert chosen.text_source("foreign") == foreign
    assert ("foreign" in chosen.text_roles()) == (foreign != "none")


@pytest.mark.default_recipe
@pytest.mark.parametrize(
    ("words", "is_read"),
    [
        ((), True),
        (("--measured_prices", "False"), False),
        (("--metric", "plain"), False),
        (("--rule", "energy"), False),
        (("--channels", "False"), True),
    ],
)
def test_held_out_text_is_read_where_prices_are_measured(words: tuple[str, ...], is_read: bool):
    chosen = parse("--param_ratio", "0.8", *words)
    chosen.to_config()
    assert ("held_out" in chosen.text_roles()) == is_read


def test_texts_that_were_chosen():
    chosen = parse("--model", "gpt2", "--calibration", "a.txt", "--evaluation", "b.txt")
    assert chosen.text_source("calibration") == "a.txt"
    assert chosen.text_source("held_out") == "a.txt"
    assert chosen.text_source("evaluation") == "b.txt"


# sizes, prompts


def test_each_size_has_a_folder_and_a_repository():
    assert parse("--param_ratio", "0.5").sizes() == [""]
    assert parse("--param_ratio", "0.5", "0.25").sizes() == ["0.5", "0.25"]
    assert PublishingArguments().repository("0.5") is None
    publishing = PublishingArguments(push_to_hub="a/b")
    assert publishing.repository() == "a/b"
    assert publishing.repository("0.5") == "a/b-0.5"


def test_prompts_that_were_chosen_left_out_or_neither():
    assert parse().prompts() == list(SAMPLE_PROMPTS)
    assert parse("--sample_prompt", "one", "two").prompts() == ["one", "two"]
    assert parse("--sample_prompt", "none").prompts() == []


def test_what_would_not_be_read_is_refused():
    with pytest.raises(ConfigError, match="as well"):
        parse("--sample_prompt", "x").to_config()


@pytest.mark.parametrize(
    ("given", "output_dir"),
    [({"push_to_hub": "a/b"}, None), ({"private": True}, "out"), ({"base_model": "a/b"}, None)],
    ids=str,
)
def test_publishing_settings_that_would_not_be_read_are_refused(
    given: dict[str, Any], output_dir: str | None
):
    with pytest.raises(ConfigError, match=r"give --[a-z_]+ as well"):
        PublishingArguments(**given).check(output_dir)
    PublishingArguments(push_to_hub="a/b", private=True, base_model="c/d").check("out")


def test_unknown_words_end_with_the_usual_message_and_nothing_is_shared(
    capsys: pytest.CaptureFixture[str],
):
    kinds = (CompressionArguments, PublishingArguments)
    first, second = parse_several(kinds, None, ["--seed", "3", "--base_model", "a/b"])
    assert (first.seed, second.base_model) == (3, "a/b")
    with pytest.raises(SystemExit):
        parse_several(kinds, None, ["--no_such_option"])
    assert "unrecognized arguments: --no_such_option" in capsys.readouterr().err


# user_errors


def end_of(action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    """Exit code and what was printed on stderr."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit) as caught, user_errors():
        action()
    return caught.value.code, stderr.getvalue()


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("kind", [LowRankError, *LowRankError.__subclasses__()])
def test_errors_of_the_library_become_one_line(
    kind: type[LowRankError], monkeypatch: pytest.MonkeyPatch
):
    code, printed = end_of(raising(kind("layer x:\n  rank 9\texceeds 8.")), monkeypatch)
    assert (code, printed) == (2, "error: layer x: rank 9 exceeds 8.\n")


def test_the_cause_stays_attached_for_a_debugger():
    error = ConfigError("no")
    with pytest.raises(SystemExit) as caught, user_errors():
        raise error
    assert caught.value.__cause__ is error


def test_an_interrupt_ends_with_its_usual_code(monkeypatch: pytest.MonkeyPatch):
    code, printed = end_of(raising(KeyboardInterrupt()), monkeypatch)
    assert code == 130
    assert printed == "interrupted; nothing was saved under the output folder's name\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left", "a.pt"), "error: [Errno 28] No space left: 'a.pt'\n"),
        (SafetensorError("I/O error"), "error: I/O error\n"),
        (
            RuntimeError("[enforce fail at inline_container.cc:6]"),
            "error: a file could not be written, the disk may be full ([enforce fail at "
            "inline_container.cc:6]).\n",
        ),
    ],
)
def test_troubles_of_the_disk_are_one_line_too(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
):
    assert end_of(raising(error), monkeypatch) == (2, line)


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("bug"), ValueError("bug"), OSError("bug"), RuntimeError("bug")],
)
def test_mistakes_of_the_program_keep_their_traceback(error: Exception):
    with pytest.raises(type(error), match="bug"), user_errors():
        raise error


def test_nothing_is_printed_where_nothing_went_wrong(capsys: pytest.CaptureFixture[str]):
    with user_errors():
        pass
    assert capsys.readouterr() == ("", "")


def test_every_error_of_the_library_is_also_a_builtin_one():
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, LowRankError) and kind is not LowRankError
    }
    assert set(kinds) == {
        "ConfigError",
        "TargetError",
        "DataError",
        "CheckpointError",
        "NumericalError",
        "StorageError",
        "PublishError",
    }
    for name, kind in kinds.items():
        assert issubclass(kind, LowRankError), name
        assert issubclass(kind, (ValueError, RuntimeError)), name


@pytest.mark.parametrize("arguments", [CompressionArguments, EncoderArguments])
def test_how_a_run_works_is_explained_once(arguments: type):
    run = {field.name: field for field in dataclasses.fields(RunOptions)}
    shared = [field for field in dataclasses.fields(arguments) if field.name in run]
    assert {"cache_dir", "recover_steps", "recover", "speed"} <= {field.name for field in shared}
    for field in shared:
        assert field.metadata["help"] == run[field.name].metadata["help"]
        assert field.default == (True if field.name == "speed" else run[field.name].default)
    assert all(kind in run["recover"].metadata["help"] for kind in RECOVERIES)

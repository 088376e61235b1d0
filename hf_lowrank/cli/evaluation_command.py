"""What scripts/evaluate_model.py does: its arguments, and their models loaded and measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hf_lowrank.cli.evaluate import Result, evaluate_models, score_classifiers
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.harness import check_harness
from hf_lowrank.evaluation.int8 import quantize_int8_
from hf_lowrank.evaluation.speed import SpeedSettings
from hf_lowrank.format.torchao_weights import check_torchao
from hf_lowrank.inputs.sources import TRUST_HELP, check_windows, load_any_causal_lm
from hf_lowrank.inputs.start_token import start_text
from hf_lowrank.inputs.text import check_local_text, token_batches

_READ_FOR_GLUE = (
    *("model", "baseline", "glue_task", "data_dir"),
    *("dtype", "device", "trust_remote_code", "output"),
)


@dataclass
class EvaluationArguments:
    """Arguments of an evaluation."""

    model: str = option("outputs/demo", "Model, dense or compressed: folder or Hub id.")
    baseline: str | None = option(None, "Model to compare with, for example the dense one.")
    evaluation: str = option(
        "demo", "Text for the perplexity, as in compress_llm.py; 'none' skips it."
    )
    evaluation_sequences: int = option(32, "Token windows of it.")
    sequence_length: int = option(256, "Tokens in each window.")
    batch_size: int = option(4, "Windows, or examples of a task, in a batch.")
    tasks: list[str] | None = option(None, "Tasks of lm-eval, which must be installed.")
    include_path: str | None = option(None, "Folder with task files of your own, for lm-eval.")
    limit: int | None = option(None, "Examples of each task; default all.")
    speed: bool = option(True, "Time prefill and decode, both models in turn.")
    prompt_tokens: int = option(128, "Tokens of the prefill.")
    new_tokens: int = option(32, "Tokens of the decode.")
    repeats: int = option(5, "Rounds of the timing.")
    int8: bool = option(
        False, "Quantize the model's linear layers, not the baseline's, to int8; needs torchao."
    )
    glue_task: str | None = option(None, "Score a fine-tuned classifier on this GLUE task only.")
    data_dir: str | None = option(None, "Folder with GLUE's original files; default: the Hub.")
    dtype: str = option("auto", "auto (as stored), float32, bfloat16 or float16.")
    device: str = option("cpu", "Device of the models.")
    trust_remote_code: bool = option(False, TRUST_HELP)
    output: str = option("outputs/evaluation.json", "JSON file with the result.")

    def sources(self) -> dict[str, str]:
        """Where the models come from."""
        return {"model": self.model} | ({"baseline": self.baseline} if self.baseline else {})

    def check(self) -> None:
        """Refuses settings that would do nothing.

        Raises:
            ConfigError: With the first of them.
        """
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if self.glue_task and (unread := [name for name in given if name not in _READ_FOR_GLUE]):
            raise ConfigError(f"glue_task scores classifiers as they are; leave {unread[0]} out.")
        if not self.glue_task and self.data_dir:
            raise ConfigError("data_dir holds GLUE's files; give --glue_task as well.")
        for name in ("include_path", "limit"):
            if name in given and not self.tasks:
                raise ConfigError(f"{name} is read with tasks alone; give --tasks as well.")


def evaluate(args: EvaluationArguments) -> Result:
    """Everything that was asked for, checked before a model is loaded.

    Raises:
        ConfigError, DataError: A setting, a text or a model does not fit, or a package is missing.
    """
    args.check()
    if args.glue_task:
        return score_classifiers(
            args.sources(),
            args.glue_task,
            args.data_dir,
            args.dtype,
            args.device,
            args.trust_remote_code,
        )
    if args.int8:
        check_torchao("int8")
    speed = SpeedSettings(1, args.prompt_tokens, args.new_tokens, args.repeats)
    if args.tasks:
        check_harness(args.include_path)
    if args.evaluation != "none":
        check_local_text(args.evaluation, "evaluation")
    loaded = {
        name: load_any_causal_lm(source, args.dtype, args.device, args.trust_remote_code)
        for name, source in args.sources().items()
    }
    models, tokenizer = {name: model for name, (model, _) in loaded.items()}, loaded["model"][1]
    if args.int8:
        quantize_int8_(models["model"])
    text = None
    if args.evaluation != "none":
        text = token_batches(
            args.evaluation,
            tokenizer,
            sequences=args.evaluation_sequences,
            sequence_length=args.sequence_length,
            role="evaluation",
            batch_size=args.batch_size,
        )
        for model in models.values():
            check_windows(model, text, args.evaluation)
    chosen = ("tasks", "include_path", "limit", "batch_size")
    result = evaluate_models(
        models,
        tokenizer,
        text=text,
        tasks={name: getattr(args, name) for name in chosen} if args.tasks else None,
        speed=speed if args.speed else None,
    )
    result["start_token"] = start_text(tokenizer)
    return result

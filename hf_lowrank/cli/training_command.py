"""Low-rank training of a causal language model: text in, smaller model and report out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import default_data_collator
from transformers.trainer import TRAINER_STATE_NAME

from hf_lowrank.compression.options import Stopwatch
from hf_lowrank.config import LowRankConfig, config_option, option
from hf_lowrank.errors import DataError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.evaluation.size import DenseSize, compare, report_fields
from hf_lowrank.inputs.sources import TRUST_HELP, check_windows, load_causal_lm
from hf_lowrank.inputs.start_token import start_text
from hf_lowrank.inputs.text import token_batches
from hf_lowrank.measuring.items import Batch
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Data, Settings
from hf_lowrank.training.form_changes import current_ranks
from hf_lowrank.training.trainer import LowRankTrainer
from hf_lowrank.training.training_arguments import LowRankTrainingArguments


@dataclass
class LanguageModelArguments:
    """Model and text of a run; how to train is in `LowRankTrainingArguments`."""

    model: str = option("demo", "Dense model, as in compress_llm.py.")
    train: str = option("demo", "Training text: a .txt, .jsonl or .parquet file, a Hub dataset.")
    train_sequences: int = option(256, "Token windows for training.")
    evaluation: str = option("demo", "Evaluation text; only the report looks at it.")
    evaluation_sequences: int = option(32, "Token windows for evaluation.")
    sequence_length: int = option(256, "Tokens in each window.")
    dtype: str = option("float32", "Data type of the weights; bf16 autocast is --bf16.")
    trust_remote_code: bool = option(False, TRUST_HELP)
    target_modules: list[str] | None = config_option("target_modules")
    exclude_modules: list[str] | None = config_option("exclude_modules")
    form: str | None = config_option("form")


@dataclass
class LanguageModelTrainingArguments(LowRankTrainingArguments):
    """`LowRankTrainingArguments` for a script that publishes the result alone.

    `Trainer` would push every checkpoint; these settings of its own are off the command line.
    """

    push_to_hub: bool = field(default=False, init=False)
    hub_token: str | None = field(default=None, init=False)
    hub_private_repo: bool | None = field(default=None, init=False)
    hub_model_id: str | None = field(default=None, init=False)
    hub_strategy: str = field(default="end", init=False)
    hub_always_push: bool = field(default=False, init=False)
    hub_revision: str | None = field(default=None, init=False)


def train_language_model(
    args: LanguageModelArguments, training: LowRankTrainingArguments
) -> tuple[nn.Module, Any, Report]:
    """Trains with ranks selected on the way, from full rank; see `LowRankTrainer`.

    Args:
        args: Model and text.
        training: How to train. A `resume_from_checkpoint` of "last" takes the last whole
            checkpoint in its `output_dir`.

    Returns:
        The model ready to ship, its tokenizer and the report, whose `data` holds `selections`.

    Raises:
        DataError, ConfigError: A setting or a text does not fit.
    """
    checkpoint = _checkpoint(training)
    if args.train == args.evaluation and args.train != "demo":
        raise DataError(f"{args.train}: is both training and evaluation text; give two files.")
    model, tokenizer = load_causal_lm(
        args.model, args.dtype, trust_remote_code=args.trust_remote_code
    )
    texts = _texts(args, model, tokenizer, training.per_device_eval_batch_size)
    config = LowRankConfig(
        target_modules=args.target_modules, exclude_modules=args.exclude_modules, form=args.form
    )
    dense = DenseSize.of(model, find_targets(model, config))
    watch = Stopwatch()
    with watch.phase("evaluation"):
        before = measure_loss(model, texts["evaluation"], progress="evaluate dense")
    trainer = LowRankTrainer(
        model,
        training,
        lowrank_config=config,
        train_dataset=_rows(texts["train"]),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    with watch.phase("training"):
        trainer.train(resume_from_checkpoint=checkpoint)
    watch.seconds["selection"] = sum(found.seconds for found in trainer.selections)
    trainer.export()
    with watch.phase("evaluation"):
        after = measure_loss(model, texts["evaluation"], progress="evaluate compressed")
    shapes = trainer.lowrank_shapes
    plan = RankPlan(current_ranks(model, shapes), shapes, form=trainer.export_form)
    report = Report(
        **report_fields(model, dense, plan),
        model=args.model,
        config=Settings.of(config),
        seed=training.seed,
        evaluation=compare(before, after),
        seconds=watch.seconds,
        training=trainer.summary(),
        data=Data(
            train=args.train,
            train_tokens=sum(batch["input_ids"].numel() for batch in texts["train"]),
            evaluation=args.evaluation,
            start_token=start_text(tokenizer),
            selections=trainer.selections,
        ),
    )
    return model, tokenizer, report


def _texts(
    args: LanguageModelArguments,
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    batch_size: int,
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Batches for "train" and "evaluation" that the model can read."""
    texts = {}
    for name, role, sequences in (
        ("train", "calibration", args.train_sequences),
        ("evaluation", "evaluation", args.evaluation_sequences),
    ):
        source = getattr(args, name)
        texts[name] = token_batches(
            source,
            tokenizer,
            sequences=sequences,
            sequence_length=args.sequence_length,
            role=role,
            batch_size=batch_size,
        )
        check_windows(model, texts[name], source)
    return texts


def _rows(batches: Sequence[Batch]) -> Dataset:
    """One row for each window, its own labels."""
    ids = torch.cat([batch["input_ids"] for batch in batches]).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _checkpoint(training: LowRankTrainingArguments) -> str | None:
    """The checkpoint to go on from.

    Raises:
        DataError: It is not there.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "last":
        if not Path(wanted).is_dir():
            raise DataError(f"resume_from_checkpoint: {wanted}: no such folder.")
        return wanted
    folder = Path(str(training.output_dir))
    found = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    if not found:
        raise DataError(f"resume_from_checkpoint: {folder} holds no checkpoint; leave it out.")
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2])))


def _is_whole(checkpoint: Path) -> bool:
    """Whether its last file, which `Trainer` writes in place like all of them, is readable."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return checkpoint.name.rpartition("-")[2].isdecimal()

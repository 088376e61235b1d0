"""A GLUE run: fine-tune dense (once, cached), compress by a method, fine-tune again, report."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_lowrank.arguments import argument
from hf_lowrank.compression import compress
from hf_lowrank.config import DEFAULT_LOSS_TOLERANCE, LowRankConfig
from hf_lowrank.data.glue import TASKS, load_glue
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.evaluation.glue import MAIN_METRIC, GlueMetric
from hf_lowrank.hub import prefer_offline_if_unreachable
from hf_lowrank.losses import Batch
from hf_lowrank.modeling_lowrank import linear_shape
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.saving import atomic_folder
from hf_lowrank.targets import find_targets
from hf_lowrank.training.arguments import LowRankTrainingArguments
from hf_lowrank.training.forms import current_ranks
from hf_lowrank.training.trainer import LowRankTrainer

# Cut first, then fine-tune: the metric of each method; its rule is the metric's default.
CUT_METHODS = {
    "svd": "plain",
    "fisher-rows": "fisher-rows",
    "activation-scale": "activation-scale",
    "whitened": "whitened",
    "kfac": "kfac",
}
# Cut while training: the rule of each method.
TRAINING_METHODS = {"rank-selection": "relative", "rank-selection-price": "price"}
METHODS = ("dense", *CUT_METHODS, *TRAINING_METHODS)


@dataclass
class GlueArguments:
    """Arguments of a GLUE run."""

    model: str = argument("sentence-transformers/all-MiniLM-L6-v2", "Encoder: Hub id or folder.")
    task: str = argument("mrpc", "Task: " + ", ".join(TASKS) + ".")
    method: str = argument("kfac", "Method: " + ", ".join(METHODS) + ".")
    param_ratio: float | None = argument(
        None, "Goal: kept share of the encoder's linear parameters."
    )
    loss_tolerance: float | None = argument(
        None, "Goal: largest rise of the loss on a held-out part of the training set, nats."
    )
    data_dir: str | None = argument(None, "Folder with the original files; default: the Hub.")
    output_dir: str | None = argument(None, "Folder for the model and report.json.")
    cache_dir: str = argument("outputs/glue_dense", "Folder for dense fine-tuned models.")
    dense_epochs: float = argument(3, "Epochs of the dense fine-tuning that all methods share.")
    dense_learning_rate: float = argument(1e-4, "Its learning rate.")
    epochs: float = argument(3, "Epochs of fine-tuning with or after the cut; 0 for none.")
    learning_rate: float = argument(5e-5, "Its learning rate.")
    batch_size: int = argument(32, "Examples in a training batch.")
    max_length: int = argument(128, "Tokens to which an example is cut.")
    train_samples: int = argument(0, "Training examples to use: a seeded subset; 0 = all.")
    calibration_samples: int = argument(1536, "Training examples for the moments.")
    bf16: bool = argument(True, "Train under bf16 autocast.")
    seed: int = argument(0, "Seed of everything random.")

    def check(self) -> None:
        """Refuses what can be known to fail.

        Raises:
            ConfigError, DataError: With the first such setting.
        """
        if self.method not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}.")
        if self.task not in TASKS:
            raise DataError(f"task must be one of {', '.join(TASKS)}; got {self.task!r}.")
        LowRankConfig(param_ratio=self.param_ratio, loss_tolerance=self.loss_tolerance)
        if self.method in TRAINING_METHODS and self.epochs <= 0:
            raise ConfigError(f"method {self.method} cuts while it trains; epochs must be > 0.")
        for name in ("batch_size", "max_length", "calibration_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}.")


@dataclass
class GlueData:
    """A task's tokenized examples.

    Attributes:
        train: Nine tenths of the training set.
        selection: The other tenth: held-out losses and the best epoch are taken from it.
        validation: The development set; only final figures are taken from it.
        collator: Pads a batch to its longest example.
    """

    train: Dataset
    selection: Dataset
    validation: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]

    def batches(self, split: Dataset, size: int, limit: int | None = None) -> list[Batch]:
        """Padded batches of a split's first examples."""
        rows = [split[i] for i in range(min(limit or len(split), len(split)))]
        return [dict(self.collator(rows[i : i + size])) for i in range(0, len(rows), size)]


def run_glue(args: GlueArguments) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The whole run.

    Returns:
        The model, its tokenizer and the report: `task`, `method`, `seed`, `metrics`,
        `uncured_metrics` (before fine-tuning), `dense_metrics`, `parameters`, `ranks`, `seconds`.
    """
    args.check()
    set_seed(args.seed)
    tokenizer, data = load_data(args)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    model = dense_model(args, tokenizer, data)
    seconds["dense"] = time.perf_counter() - start
    targets = find_targets(model, LowRankConfig())
    shapes = {name: linear_shape(layer) for name, layer in targets.items()}
    report: dict[str, Any] = {
        "task": args.task,
        "method": args.method,
        "seed": args.seed,
        "arguments": vars(args),
        "dense_metrics": evaluate_glue(model, args, data),
    }
    if args.method in CUT_METHODS:
        report |= _cut_then_train(model, args, data, seconds)
    elif args.method in TRAINING_METHODS:
        report |= _cut_while_training(model, args, data, seconds)
    ranks = current_ranks(model, shapes)
    plan = RankPlan(ranks, shapes)
    report["metrics"] = evaluate_glue(model, args, data)
    report["parameters"] = {
        "targeted_dense": plan.dense_parameters,
        "targeted_kept": plan.kept_parameters,
    }
    return model, tokenizer, report | {"ranks": ranks, "seconds": seconds}


def load_data(args: GlueArguments) -> tuple[Any, GlueData]:
    """The tokenizer and the task's data, split and tokenized."""
    if not Path(args.model).is_dir():
        prefer_offline_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{args.model}: no such folder, and the Hub has no such model or can't be reached; "
            f"offline, give a local folder. ({reason})"
        ) from error
    train = load_glue(args.task, "train", args.data_dir).shuffle(seed=args.seed)
    if args.train_samples:
        train = train.select(range(min(args.train_samples, len(train))))
    if len(train) < 2:
        raise DataError(f"{args.task}: {len(train)} training example is too few; 2 are needed.")
    held_out = max(1, len(train) // 10)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        pair = (row["sentence1"], row.get("sentence2"))
        found = dict(tokenizer(*pair, truncation=True, max_length=args.max_length))
        return found | {"labels": row["label"]}

    def prepare(split: Dataset) -> Dataset:
        return split.map(tokenize, remove_columns=split.column_names)

    data = GlueData(
        train=prepare(train.select(range(held_out, len(train)))),
        selection=prepare(train.select(range(held_out))),
        validation=prepare(load_glue(args.task, "validation", args.data_dir)),
        collator=DataCollatorWithPadding(tokenizer),
    )
    return tokenizer, data


def dense_model(args: GlueArguments, tokenizer: Any, data: GlueData) -> nn.Module:  # noqa: ANN401
    """The dense model fine-tuned on the task: from the cache, or trained and cached."""
    relevant = ("model", "task", "dense_epochs", "dense_learning_rate", "batch_size", "max_length")
    key = json.dumps([getattr(args, n) for n in (*relevant, "train_samples", "bf16", "seed")])
    folder = Path(args.cache_dir) / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    if not folder.is_dir():
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=TASKS[args.task].num_labels, dtype=torch.float32
        )
        fine_tune(model, args, data, args.dense_epochs, args.dense_learning_rate)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    dense: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder)
    return dense


def fine_tune(
    model: nn.Module, args: GlueArguments, data: GlueData, epochs: float, learning_rate: float
) -> None:
    """Trains in place and keeps the best epoch by the held-out loss, the start included."""
    if epochs <= 0:
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                **_training_settings(args, folder, epochs, learning_rate),
                eval_strategy="epoch",
                eval_on_start=True,
            ),
            train_dataset=data.train,
            eval_dataset=data.selection,
            data_collator=data.collator,
        )
        keeper = _BestKeeper(model)
        trainer.add_callback(keeper)
        trainer.train()
        keeper.restore()


def evaluate_glue(model: nn.Module, args: GlueArguments, data: GlueData) -> dict[str, float]:
    """The task's metrics on the development set."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    predictions: list[float] = []
    references: list[float] = []
    for batch in data.batches(data.validation, 64):
        inputs = {n: value.to(device) for n, value in batch.items() if n != "labels"}
        with torch.no_grad():
            logits = model(**inputs).logits
        single = logits.shape[-1] == 1
        predictions += (logits.squeeze(-1) if single else logits.argmax(-1)).tolist()
        references += batch["labels"].tolist()
    model.train(was_training)
    metric = GlueMetric(config_name=args.task)
    return metric.compute(predictions=predictions, references=references) or {}


def main_score(args: GlueArguments, scores: dict[str, float]) -> float:
    """The task's one figure."""
    return scores[MAIN_METRIC[args.task]]


def _cut_then_train(
    model: nn.Module, args: GlueArguments, data: GlueData, seconds: dict[str, float]
) -> dict[str, Any]:
    config = LowRankConfig(
        param_ratio=args.param_ratio,
        loss_tolerance=args.loss_tolerance,
        metric=CUT_METHODS[args.method],
        label_source="model",
        seed=args.seed,
    )
    start = time.perf_counter()
    found = compress(
        model,
        config,
        data.batches(data.train, args.batch_size, args.calibration_samples),
        held_out=data.batches(data.selection, args.batch_size),
    )
    seconds["compress"] = time.perf_counter() - start
    uncured = evaluate_glue(model, args, data)
    start = time.perf_counter()
    fine_tune(model, args, data, args.epochs, args.learning_rate)
    seconds["fine_tune"] = time.perf_counter() - start
    return {"uncured_metrics": uncured, "probes": found.probes, "held_out": found.held_out}


def _cut_while_training(
    model: nn.Module, args: GlueArguments, data: GlueData, seconds: dict[str, float]
) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = LowRankTrainer(
            model,
            LowRankTrainingArguments(
                **_training_settings(args, folder, args.epochs, args.learning_rate),
                selection_rule=TRAINING_METHODS[args.method],
                target_param_ratio=args.param_ratio,
                selection_tolerance=args.loss_tolerance or DEFAULT_LOSS_TOLERANCE,
            ),
            train_dataset=data.train,
            data_collator=data.collator,
        )
        trainer.train()
        trainer.export()
    seconds["train"] = time.perf_counter() - start
    seconds["selection"] = sum(found["seconds"] for found in trainer.selections)
    return {"selections": trainer.selections}


def _training_settings(
    args: GlueArguments, folder: str, epochs: float, learning_rate: float
) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "train_sampling_strategy": "group_by_length",
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": [],
        "seed": args.seed,
        "logging_steps": 50,
    }


class _BestKeeper(TrainerCallback):
    """Remembers the weights with the lowest held-out loss; a model of this size fits in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.best_loss = math.inf
        self.best: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after every evaluation, that before the first step included."""
        loss = kwargs["metrics"]["eval_loss"]
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: t.clone() for name, t in self.model.state_dict().items()}

    def restore(self) -> None:
        """Puts the best weights back."""
        if self.best:
            self.model.load_state_dict(self.best)

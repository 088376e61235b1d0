"""Fine-tuning on a task: Trainer's settings, the best epoch, the cached dense model."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowrank.files import atomic_folder
from hf_lowrank.tasks.models import attention
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.task_arguments import TaskArguments
from hf_lowrank.training.best import BestWeights
from hf_lowrank.training.distillation import DistillationArguments, DistillingTrainer

# Beside the dense models in the cache folder: spectra, from which other sizes are cut.
SPECTRA_FOLDER = "spectra"
# What a dense model depends on; the name of its folder is made from it.
_DENSE_KEY = (
    *("model", "dense_epochs", "dense_learning_rate", "batch_size", "max_length"),
    *("train_samples", "attention_dropout", "bf16", "seed"),
)


def dense_model(task: Task, args: TaskArguments) -> nn.Module:
    """The dense model fine-tuned on the task: from the cache, or trained and cached."""
    settings = (getattr(args, name) for name in _DENSE_KEY)
    key = json.dumps([task.name, *settings, *task.data_key])
    folder = Path(args.cache_dir) / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    if not folder.is_dir():
        model = task.new_model()
        length = {"num_train_epochs": args.dense_epochs}
        fine_tune_(model, task, args, length, args.dense_learning_rate)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)  # type: ignore[operator]
            task.tokenizer.save_pretrained(temporary)
    dense: nn.Module = task.model_class.from_pretrained(
        folder,
        attn_implementation=attention(args),
        trust_remote_code=args.trust_remote_code,
    )
    return dense


def teacher_of(task: Task, args: TaskArguments) -> nn.Module | None:
    """What a run is distilled from: the dense fine-tuned model, None without distillation."""
    return dense_model(task, args) if args.distillation_weight > 0 else None


def training_length(args: TaskArguments, part: float = 1.0) -> dict[str, float]:
    """How long a part of the training with or after a cut is, as a field of `TrainingArguments`."""
    if args.steps:
        return {"max_steps": max(1, round(part * args.steps))}
    return {"num_train_epochs": part * args.epochs}


def split_length(args: TaskArguments, share: float) -> tuple[dict[str, float], dict[str, float]]:
    """The lengths of two parts of that training, which sum to it; a share of 0 leaves it whole."""
    if not args.steps or not share:
        return training_length(args, share), training_length(args, 1 - share)
    first = min(args.steps - 1, max(1, round(share * args.steps)))
    return {"max_steps": first}, {"max_steps": args.steps - first}


def fine_tune_(
    model: nn.Module,
    task: Task,
    args: TaskArguments,
    length: Mapping[str, float],
    learning_rate: float,
    teacher: nn.Module | None = None,
) -> None:
    """Trains in place and keeps the best epoch by the held-out loss, the start included."""
    if not any(length.values()):
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = training_settings(args, folder, length, learning_rate, teacher)
        trainer = DistillingTrainer(
            model,
            DistillationArguments(**settings, eval_on_start=True),
            teacher=teacher,
            train_dataset=task.train,
            eval_dataset=task.held_out,
            data_collator=task.collator,
        )
        best = BestWeights(model)
        trainer.add_callback(best)
        trainer.train()
        best.restore_()


def training_settings(
    args: TaskArguments,
    folder: str,
    length: Mapping[str, float],
    learning_rate: float,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Training arguments that all methods share, so that rows can be compared.

    They are of `DistillationArguments` with a teacher, of `TrainingArguments` without.
    """
    distillation = {"distillation_weight": args.distillation_weight} if teacher else {}
    return {
        **length,
        **distillation,
        "output_dir": folder,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "train_sampling_strategy": "group_by_length",
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": not sys.stderr.isatty(),
        "seed": args.seed,
        "logging_steps": 50,
    }

"""The methods that a task's dense model can be compressed by, behind one signature."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from torch import nn
from transformers import set_seed

from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.compression.verbs import compress
from hf_lowrank.config import DEFAULT_LOSS_TOLERANCE, READERS, LowRankConfig
from hf_lowrank.pruning.lpaf import STAGES, LpafSettings, lpaf_
from hf_lowrank.pruning.pruned_ranks import mean_ranks, target_weights
from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Settings
from hf_lowrank.tasks.fine_tuning import (
    SPECTRA_FOLDER,
    fine_tune_,
    split_length,
    teacher_of,
    training_length,
    training_settings,
)
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.task_arguments import (
    CUTS,
    CUTTLEFISH_VARIANTS,
    JOINT,
    LPAF_VARIANTS,
    SELECTION_RULES,
    TaskArguments,
)
from hf_lowrank.tasks.task_report import main_score
from hf_lowrank.training.best import BestWeights
from hf_lowrank.training.distillation import DistillationArguments, DistillingTrainer
from hf_lowrank.training.switch import FullRankSwitch
from hf_lowrank.training.trainer import LowRankTrainer
from hf_lowrank.training.training_arguments import LowRankTrainingArguments

# Compresses the fine-tuned dense model in place and returns its part of the report, with `seconds`
# by phase and, where a fine-tuning follows the cut, `uncured_metrics` from before it.
Method = Callable[[nn.Module, Task, TaskArguments], dict[str, Any]]


def train_on_(model: nn.Module, task: Task, args: TaskArguments) -> dict[str, Any]:
    """No compression, as many epochs as the other methods have: the row to compare with."""
    return _then_fine_tune_(model, task, args)


def cut_then_train_(
    model: nn.Module, task: Task, args: TaskArguments, *, metric: str, channels: bool = False
) -> dict[str, Any]:
    """One cut in a metric, with the metric's default rule; then fine-tuning of what is left."""
    return _cut_then_fine_tune_(model, task, args, cut_config(args, metric, channels))


def _cut_then_fine_tune_(
    model: nn.Module, task: Task, args: TaskArguments, config: LowRankConfig, part: float = 1.0
) -> dict[str, Any]:
    start = time.perf_counter()
    found = compress(
        model,
        config,
        task.batches(task.train, args.batch_size, args.calibration_samples),
        held_out=task.batches(task.held_out, args.batch_size),
        # The other sizes are cut from the same spectra.
        cache_dir=Path(args.cache_dir) / SPECTRA_FOLDER,
        progress=sys.stderr.isatty(),
    )
    seconds = {"compress": time.perf_counter() - start}
    report = _then_fine_tune_(model, task, args, part)
    return _cut_fields(found) | report | {"seconds": seconds | report["seconds"]}


def cut_jointly_then_train_(model: nn.Module, task: Task, args: TaskArguments) -> dict[str, Any]:
    """One cut with ranks and factors steered along the gradient (docs/methods.md, 5)."""
    start = time.perf_counter()
    accepting = _without(task.held_out, [task.validation])
    fitting = _without(
        task.train.select(range(min(args.calibration_samples, len(task.train)))),
        [task.validation, task.held_out],
    )
    found = compress_jointly(
        model,
        cut_config(args, "kfac"),
        task.batches(fitting, args.batch_size),
        task.batches(accepting, args.batch_size),
        task.batches(task.validation, args.batch_size),
        progress=sys.stderr.isatty(),
    )
    seconds = {"compress": time.perf_counter() - start}
    report = _then_fine_tune_(model, task, args) | {"joint": found.joint}
    return _cut_fields(found) | report | {"seconds": seconds | report["seconds"]}


def _without(split: Dataset, others: Sequence[Dataset]) -> Dataset:
    """The examples of a split whose text is in none of the other splits."""
    texts = {tuple(ids) for other in others for ids in other["input_ids"]}
    return split.select([i for i, ids in enumerate(split["input_ids"]) if tuple(ids) not in texts])


def _cut_fields(found: Report) -> dict[str, Any]:
    """What the report of a run says of its cut."""
    names = ("config", "probes", "held_out", "failures")
    return {name: getattr(found, name) for name in names}


def cut_while_training_(
    model: nn.Module, task: Task, args: TaskArguments, *, rule: str
) -> dict[str, Any]:
    """Low-rank training from full rank, ranks selected as it goes on (docs/methods.md, 3)."""
    start = time.perf_counter()
    target = args.param_ratio
    with tempfile.TemporaryDirectory() as folder:
        steps_per_epoch = -(-len(task.train) // args.batch_size)
        trainer = LowRankTrainer(
            model,
            LowRankTrainingArguments(
                **training_settings(args, folder, training_length(args), args.learning_rate),
                selection_rule=rule,
                selection_steps=max(1, steps_per_epoch // args.selections_per_epoch),
                selection_samples=args.selection_samples,
                target_param_ratio=target,
                selection_tolerance=(
                    DEFAULT_LOSS_TOLERANCE if args.loss_tolerance is None else args.loss_tolerance
                ),
            ),
            train_dataset=task.train,
            eval_dataset=task.held_out,
            data_collator=task.collator,
        )
        best = BestWeights(model, lambda: target is not None and trainer.param_ratio() <= target)
        trainer.add_callback(best)
        trainer.train()
        best.restore_()
        trainer.export()
    selection = sum(found.seconds for found in trainer.selections)
    return {
        "training": trainer.summary(),
        "selections": trainer.selections,
        "seconds": {"train": time.perf_counter() - start - selection, "selection": selection},
    }


def settle_cut_train_(
    model: nn.Module, task: Task, args: TaskArguments, *, metric: str
) -> dict[str, Any]:
    """Cuttlefish (docs/methods.md, 6): full rank until stable ranks settle, then the factors.

    The learning rate of the full-rank training falls as if that went on for all epochs; the
    factors train for what is left of them under a schedule of their own.
    """

    def stable_ranks() -> dict[str, float]:
        layers = mean_ranks(target_weights(model)).layers
        return {name: found.stable_rank for name, found in layers.items()}

    start = time.perf_counter()
    switch = FullRankSwitch(stable_ranks, args.selections_per_epoch, args.full_rank_share)
    teacher = teacher_of(task, args)
    with tempfile.TemporaryDirectory() as folder:
        length = training_length(args)
        settings = training_settings(args, folder, length, args.learning_rate, teacher)
        trainer = DistillingTrainer(
            model,
            DistillationArguments(**settings | {"eval_strategy": "no"}),
            teacher=teacher,
            train_dataset=task.train,
            data_collator=task.collator,
            callbacks=[switch],
        )
        trainer.train()
    # Trainer leaves its autocast on the model; moments are measured without.
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    seconds = {"full_rank": time.perf_counter() - start}
    # A bit short: Trainer rounds epochs up, and rounding errors must not add a step to them.
    left = trainer.state.max_steps - trainer.state.global_step - 0.25
    config = cut_config(args, metric).replace(rule="stable-rank")
    report = _cut_then_fine_tune_(model, task, args, config, left / trainer.state.max_steps)
    return report | {"switch": switch.summary(), "seconds": seconds | report["seconds"]}


def prune_cut_train_(
    model: nn.Module,
    task: Task,
    args: TaskArguments,
    *,
    metric: str = "sparsity",
    criterion: str = "sensitivity",
    prune: bool = True,
    mixed_rank: bool = True,
) -> dict[str, Any]:
    """LPAF (docs/methods.md, 4): the steps are split between pruning and mixed-rank tuning.

    Without pruning the mixed-rank tuning has all of them. A pruned model that keeps less than
    `args.gate` of the dense score on the held-out examples is not factorized but left as it is,
    and the report's `refusal` says so.
    """
    teacher = teacher_of(task, args)
    found: dict[str, Any] = {}

    def on_stage(stage: str, model: nn.Module) -> bool:
        if stage == STAGES[2] or (stage == STAGES[0] and not prune):
            return True
        name = "pruned" if stage == STAGES[0] else "uncured"
        found[f"{name}_metrics"] = task.score(model, task.validation)
        held_out = found[f"{name}_held_out_metrics"] = task.score(model, task.held_out)
        if stage == STAGES[0] and main_score(held_out) < args.gate * dense_score:
            found["refusal"] = (
                f"Not factorized: pruning left {main_score(held_out):.4f} of the dense "
                f"{dense_score:.4f} on the held-out examples, less than {args.gate:.0%}. Give it "
                "more steps or a higher final_density."
            )
        return "refusal" not in found

    dense_score = main_score(task.score(model, task.held_out))
    if args.pruning_start == "pre-trained":
        set_seed(args.seed)  # of the fresh head
        model.load_state_dict(task.new_model().state_dict())
    config = cut_config(args, metric)
    pruning, mixing = split_length(args, args.pruning_share if prune else 0.0)
    shared = training_settings(args, "", {}, args.learning_rate, teacher)
    for name in ("output_dir", "eval_strategy", "save_strategy"):
        del shared[name]
    lpaf = lpaf_(
        model,
        task.train,
        task.collator,
        LpafSettings(
            compression=config,
            prune=prune,
            mixed_rank=mixed_rank,
            pruning={
                **pruning,
                "final_density": args.final_density,
                "pruning_criterion": criterion,
            },
            fine_tuning=mixing,
            training=shared,
        ),
        calibration=task.batches(task.train, args.batch_size, args.calibration_samples),
        held_out=task.batches(task.held_out, args.batch_size),
        eval_dataset=task.held_out,
        teacher=teacher,
        work_dir=Path(args.cache_dir) / "lpaf",
        on_stage=on_stage,
    )
    report = {"config": Settings.of(config), "lpaf": lpaf}
    return report | {"seconds": dict(lpaf.seconds)} | found


def cut_config(args: TaskArguments, metric: str, channels: bool = False) -> LowRankConfig:
    """How a method cuts; labels, where its metric reads any, come from the model itself."""
    reads_labels = metric in READERS["label_source"][1]
    return LowRankConfig(
        param_ratio=args.param_ratio,
        loss_tolerance=args.loss_tolerance,
        metric=metric,
        channels=channels,
        label_source="model" if reads_labels else LowRankConfig.label_source,
        seed=args.seed,
        form=args.form,
    )


def _then_fine_tune_(
    model: nn.Module, task: Task, args: TaskArguments, part: float = 1.0
) -> dict[str, Any]:
    uncured = task.score(model, task.validation)
    uncured_held_out = task.score(model, task.held_out)
    start = time.perf_counter()
    length, teacher = training_length(args, part), teacher_of(task, args)
    fine_tune_(model, task, args, length, args.learning_rate, teacher)
    return {
        "uncured_metrics": uncured,
        "uncured_held_out_metrics": uncured_held_out,
        "seconds": {"fine_tune": time.perf_counter() - start},
    }


METHODS: dict[str, Method] = {"dense": train_on_}
METHODS |= {name: partial(cut_then_train_, **cut) for name, cut in CUTS.items()}
METHODS[JOINT] = cut_jointly_then_train_
METHODS |= {name: partial(cut_while_training_, rule=r) for name, r in SELECTION_RULES.items()}
METHODS |= {name: partial(settle_cut_train_, metric=m) for name, m in CUTTLEFISH_VARIANTS.items()}
METHODS |= {name: partial(prune_cut_train_, **parts) for name, parts in LPAF_VARIANTS.items()}

"""One run: the dense model of a task, compressed by a method, measured before and after."""

from __future__ import annotations

import time
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.evaluation.perplexity import LossMeasurement, measure_loss
from hf_lowrank.evaluation.size import DenseSize, report_fields
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.rebuild import narrowed_layers
from hf_lowrank.inputs.sources import hub_id
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.tolerance import paired_difference
from hf_lowrank.report.provenance import today
from hf_lowrank.report.sections import Settings
from hf_lowrank.tasks.fine_tuning import dense_model
from hf_lowrank.tasks.methods import METHODS
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.task_arguments import TaskArguments
from hf_lowrank.tasks.task_report import DevelopmentLoss, TaskReport
from hf_lowrank.training.form_changes import current_form, current_ranks


def run_task(task: Task, args: TaskArguments) -> tuple[nn.Module, TaskReport]:
    """The whole run.

    Returns:
        The compressed model and the report.
    """
    start = time.perf_counter()
    model = dense_model(task, args)
    seconds = {"dense": time.perf_counter() - start}
    targets = find_targets(model, LowRankConfig())
    shapes = {name: linear_shape(layer) for name, layer in targets.items()}
    dense = DenseSize.of(model, targets)
    validation = task.batches(task.validation, args.batch_size)
    before = measure_loss(model, validation)
    found: dict[str, Any] = {
        "dense_metrics": task.score(model, task.validation),
        "dense_held_out_metrics": task.score(model, task.held_out),
    }
    found |= {"config": Settings()} | METHODS[args.method](model, task, args)
    found["seconds"] = seconds | found["seconds"]
    narrowed = {name: linear_shape(layer) for name, layer in narrowed_layers(model).items()}
    plan = RankPlan(current_ranks(model, shapes), shapes, narrowed, current_form(model))
    held_out = task.batches(task.held_out, args.batch_size)
    found["metrics"] = task.score(model, task.validation)
    found["held_out_metrics"] = task.score(model, task.held_out)
    found["held_out_loss"] = measure_loss(model, held_out).mean
    # As it is saved: Trainer leaves the autocast of its training on the model.
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    return model, TaskReport(
        **found,
        **report_fields(model, dense, plan),
        model=args.model,
        base_model=hub_id(args.model),
        seed=args.seed,
        date=today(),
        data=task.data,
        task=task.name,
        method=args.method,
        arguments=dict(vars(args)),
        development_loss=_compared(before, measure_loss(model, validation), task.scored),
    )


def _compared(before: LossMeasurement, after: LossMeasurement, per: str) -> DevelopmentLoss:
    found = paired_difference(before.items, after.items)
    return DevelopmentLoss(before.mean, after.mean, found.mean, found.standard_error, per)

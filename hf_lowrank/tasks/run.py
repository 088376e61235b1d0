"""One run: the dense model of a task, compressed by a method, measured before and after."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from hf_lowrank.before_after import model_sizes
from hf_lowrank.config import LowRankConfig
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.modeling_lowrank import linear_shape
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.schema import versions
from hf_lowrank.report.task import TaskReport
from hf_lowrank.sources import hub_id
from hf_lowrank.targets import find_targets, untouched_weights
from hf_lowrank.tasks.arguments import TaskArguments
from hf_lowrank.tasks.fine_tuning import dense_model
from hf_lowrank.tasks.methods import METHODS
from hf_lowrank.tasks.task import Task
from hf_lowrank.training.forms import current_ranks


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
    untouched = untouched_weights(model, targets)
    dense_sizes = model_sizes(model)
    found: dict[str, Any] = {
        "dense_metrics": task.score(model, task.validation),
        "dense_held_out_metrics": task.score(model, task.held_out),
    }
    found |= {"config": {}} | METHODS[args.method](model, task, args)
    found["seconds"] = seconds | found["seconds"]
    plan = RankPlan(current_ranks(model, shapes), shapes)
    sizes = model_sizes(model)
    held_out = task.batches(task.held_out, args.batch_size)
    return model, TaskReport(
        **found,
        model=args.model,
        base_model=hub_id(args.model),
        architecture=type(model).__name__,
        seed=args.seed,
        versions=versions(),
        parameters={
            "dense": dense_sizes[0],
            "kept": sizes[0],
            "targeted_dense": plan.dense_parameters,
            "targeted_kept": plan.kept_parameters,
        },
        bytes={"dense": dense_sizes[1], "kept": sizes[1]},
        ranks=dict(plan.ranks),
        untouched=untouched,
        data=task.data,
        task=task.name,
        method=args.method,
        arguments=dict(vars(args)),
        metrics=task.score(model, task.validation),
        held_out_metrics=task.score(model, task.held_out),
        held_out_loss=measure_loss(model, held_out).mean,
    )

"""One run: the dense model of a task, compressed by a method, measured before and after."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.modeling_lowrank import linear_shape
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.targets import find_targets
from hf_lowrank.tasks.arguments import TaskArguments
from hf_lowrank.tasks.fine_tuning import dense_model
from hf_lowrank.tasks.methods import METHODS
from hf_lowrank.tasks.task import Task
from hf_lowrank.training.forms import current_ranks


def run_task(task: Task, args: TaskArguments) -> tuple[nn.Module, dict[str, Any]]:
    """The whole run.

    Returns:
        The compressed model and the report: `task`, `method`, `seed`, `arguments`; the metrics on
        the development set `metrics`, `uncured_metrics` (before fine-tuning) and `dense_metrics`;
        the same on the held-out part of the training set (`held_out_metrics` ...), with its loss;
        `parameters`, `ranks`, `seconds`.
    """
    start = time.perf_counter()
    model = dense_model(task, args)
    seconds = {"dense": time.perf_counter() - start}
    targets = find_targets(model, LowRankConfig())
    shapes = {name: linear_shape(layer) for name, layer in targets.items()}
    report: dict[str, Any] = {
        "task": task.name,
        "method": args.method,
        "seed": args.seed,
        "arguments": vars(args),
        "dense_metrics": task.score(model, task.validation),
        "dense_held_out_metrics": task.score(model, task.held_out),
    }
    report |= METHODS[args.method](model, task, args)
    ranks = current_ranks(model, shapes)
    plan = RankPlan(ranks, shapes)
    held_out = task.batches(task.held_out, args.batch_size)
    return model, report | {
        "metrics": task.score(model, task.validation),
        "held_out_metrics": task.score(model, task.held_out),
        "held_out_loss": measure_loss(model, held_out).mean,
        "parameters": {
            "targeted_dense": plan.dense_parameters,
            "targeted_kept": plan.kept_parameters,
        },
        "ranks": ranks,
        "seconds": seconds | report["seconds"],
    }

"""Ranks of a task's weights, pruned in several ways to the same density (docs/methods.md, 4)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.figures import draw_spectra
from benchmarks.table import part_of
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.pruning.pruned_ranks import LayerRanks, mean_ranks, target_weights
from hf_lowrank.pruning.pruning_arguments import PruningArguments
from hf_lowrank.pruning.pruning_trainer import PruningTrainer
from hf_lowrank.pruning.scores import CRITERIA
from hf_lowrank.report.provenance import write_result
from hf_lowrank.report.text.table import align
from hf_lowrank.tasks.fine_tuning import (
    dense_model,
    teacher_of,
    training_length,
    training_settings,
)
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.task_arguments import TaskArguments


@dataclass
class PrunedRanksArguments(GlueArguments):
    """Arguments of the comparison; `steps` or `epochs` of pruning end at `final_density`."""

    output: str = option("outputs/pruned-ranks.json", "JSON file with the ranks.")
    picture: str = option("outputs/pruned-ranks.svg", "SVG file with the spectra.")


def compare_pruned_ranks(args: PrunedRanksArguments) -> None:
    """Prunes the dense fine-tuned model by each criterion; prints, draws and writes the ranks."""
    settings = part_of(args, GlueArguments)
    found = pruned_ranks(load_glue_task(settings), settings)
    print(format_ranks(found))
    spectra = {
        way: {name: layer.pop("spectrum") for name, layer in result["layers"].items()}
        for way, result in found.items()
    }
    write_result(Path(args.output), {"arguments": vars(args), "ranks": found})
    draw_spectra(spectra, Path(args.picture))


def pruned_ranks(task: Task, args: TaskArguments) -> dict[str, dict[str, Any]]:
    """Ranks and spectra of the dense fine-tuned weights and of what each criterion leaves of them.

    Returns:
        For "dense" and each criterion the fields of `LayerRanks`, and the model's `metrics` on the
        development set and `held_out_metrics`, by which LPAF's gate judges.
    """
    model = dense_model(task, args)
    scores = {"dense": _scores(model, task)}
    found = {"dense": mean_ranks(target_weights(model))}
    pruned: dict[str, Mapping[str, torch.Tensor]] = {}
    for criterion in CRITERIA:
        model = dense_model(task, args)
        _prune_(model, task, args, criterion)
        pruned[criterion] = target_weights(model)
        scores[criterion] = _scores(model, task)
    found |= compare_ranks(pruned)
    return {way: {**scores[way], **asdict(result)} for way, result in found.items()}


def _scores(model: nn.Module, task: Task) -> dict[str, Any]:
    return {
        "metrics": task.score(model, task.validation),
        "held_out_metrics": task.score(model, task.held_out),
    }


def format_ranks(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Density, mean ranks and main score as a table."""
    names = ("density", "matrix_rank", "numerical_rank", "energy_rank", "stable_rank")
    main = next(iter(found["dense"]["metrics"]))
    rows = [["", *names, main]]
    for way, result in found.items():
        figures = [f"{result['density']:.4f}", *(f"{result[name]:.1f}" for name in names[1:])]
        rows.append([way, *figures, f"{result['metrics'][main]:.4f}"])
    return align(rows)


def _prune_(model: nn.Module, task: Task, args: TaskArguments, criterion: str) -> None:
    teacher, length = teacher_of(task, args), training_length(args)
    with tempfile.TemporaryDirectory() as folder:
        settings = training_settings(args, folder, length, args.learning_rate, teacher)
        trainer = PruningTrainer(
            model,
            PruningArguments(
                **(settings | {"eval_strategy": "no"}),
                final_density=args.final_density,
                pruning_criterion=criterion,
            ),
            teacher=teacher,
            train_dataset=task.train,
            data_collator=task.collator,
        )
        trainer.train()


def compare_ranks(
    pruned: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    largest_gap: float = 0.005,
    **settings: float,
) -> dict[str, LayerRanks]:
    """Ranks of weights that were pruned in different ways to the same density.

    Args:
        pruned: Weights by layer name, by the way of pruning ("movement", "magnitude", ...).
        largest_gap: How far the densities may be apart.
        **settings: `threshold` and `energy` of `rank_profile`.

    Returns:
        `mean_ranks` of each way.

    Raises:
        ConfigError: The densities differ by more, or the layers are not the same.
    """
    names = {tuple(weights) for weights in pruned.values()}
    if len(names) != 1:
        raise ConfigError("The models to compare have different layers; give those of one run.")
    found = {way: mean_ranks(weights, **settings) for way, weights in pruned.items()}
    densities = {way: result.density for way, result in found.items()}
    if max(densities.values()) - min(densities.values()) > largest_gap:
        text = ", ".join(f"{way} {density:.4f}" for way, density in densities.items())
        raise ConfigError(f"Ranks compare at equal density only; got {text}.")
    return found

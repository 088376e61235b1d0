"""The comparisons by the names that scripts/benchmark.py knows: their arguments, and what runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.architectures import ArchitecturesArguments, sweep_architectures
from benchmarks.assisted import AssistedArguments, compare_assisted
from benchmarks.bounds import BoundsArguments, check_bounds
from benchmarks.damaged_checkpoints import DamagedArguments, try_damaged_checkpoints
from benchmarks.embeddings import EmbeddingsArguments, compare_embeddings
from benchmarks.experts import ExpertsArguments, compare_experts
from benchmarks.export_speed import ExportSpeedArguments, compare_exports
from benchmarks.form_numerics import FormNumericsArguments, measure_numerics
from benchmarks.form_speed import FormSpeedArguments, compare_speeds
from benchmarks.frontier import FrontierArguments, measure_frontier
from benchmarks.frontier_embeddings import (
    EmbeddingFrontierArguments,
    measure_embedding_frontier,
)
from benchmarks.glue import GlueTableArguments, fill_glue_table
from benchmarks.glue_size import GlueSizeArguments, find_smallest_sizes
from benchmarks.kills import KillsArguments, kill_runs
from benchmarks.language_models import (
    MetricsArguments,
    RecoveryArguments,
    SystemsArguments,
    compare_all_metrics,
    compare_all_systems,
    measure_recoveries,
)
from benchmarks.perturbation import PerturbationArguments, measure_perturbations
from benchmarks.pruned_ranks import PrunedRanksArguments, compare_pruned_ranks
from benchmarks.qa import QaTableArguments, fill_qa_table
from benchmarks.recipe import RecipeArguments, compare_recipes
from benchmarks.size_in_bytes import SizeInBytesArguments, compare_types
from benchmarks.stored_rows import ShowArguments, show_rows
from benchmarks.streaming import StreamingArguments, compare_streaming
from benchmarks.vllm_speed import VllmSpeedArguments, compare_in_vllm

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "embeddings": (EmbeddingsArguments, compare_embeddings),
    "bytes": (SizeInBytesArguments, compare_types),
    "frontier": (FrontierArguments, measure_frontier),
    "frontier-embeddings": (EmbeddingFrontierArguments, measure_embedding_frontier),
    "recipe": (RecipeArguments, compare_recipes),
    "recovery": (RecoveryArguments, measure_recoveries),
    "metrics": (MetricsArguments, compare_all_metrics),
    "systems": (SystemsArguments, compare_all_systems),
    "show": (ShowArguments, show_rows),
    "perturbation": (PerturbationArguments, measure_perturbations),
    "glue": (GlueTableArguments, fill_glue_table),
    "glue-size": (GlueSizeArguments, find_smallest_sizes),
    "qa": (QaTableArguments, fill_qa_table),
    "pruned-ranks": (PrunedRanksArguments, compare_pruned_ranks),
    "bounds": (BoundsArguments, check_bounds),
    "form-speed": (FormSpeedArguments, compare_speeds),
    "form-numerics": (FormNumericsArguments, measure_numerics),
    "architectures": (ArchitecturesArguments, sweep_architectures),
    "damaged-checkpoints": (DamagedArguments, try_damaged_checkpoints),
    "kills": (KillsArguments, kill_runs),
    "vllm": (VllmSpeedArguments, compare_in_vllm),
    "exports": (ExportSpeedArguments, compare_exports),
    "experts": (ExpertsArguments, compare_experts),
    "assisted": (AssistedArguments, compare_assisted),
    "streaming": (StreamingArguments, compare_streaming),
}

"""The comparisons by the names that scripts/benchmark.py knows: their arguments, and what runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Command = tuple[type, Callable[[Any], None]]

# Module, arguments, and what runs.
_PLACES = {
    "embeddings": ("embeddings", "EmbeddingsArguments", "compare_embeddings"),
    "bytes": ("size_in_bytes", "SizeInBytesArguments", "compare_types"),
    "frontier": ("frontier", "FrontierArguments", "measure_frontier"),
    "frontier-embeddings": (
        "frontier_embeddings",
        "EmbeddingFrontierArguments",
        "measure_embedding_frontier",
    ),
    "recipe": ("recipe", "RecipeArguments", "compare_recipes"),
    "recovery": ("language_models", "RecoveryArguments", "measure_recoveries"),
    "metrics": ("language_models", "MetricsArguments", "compare_all_metrics"),
    "systems": ("language_models", "SystemsArguments", "compare_all_systems"),
    "show": ("stored_rows", "ShowArguments", "show_rows"),
    "perturbation": ("perturbation", "PerturbationArguments", "measure_perturbations"),
    "glue": ("glue", "GlueTableArguments", "fill_glue_table"),
    "glue-size": ("glue_size", "GlueSizeArguments", "find_smallest_sizes"),
    "qa": ("qa", "QaTableArguments", "fill_qa_table"),
    "pruned-ranks": ("pruned_ranks", "PrunedRanksArguments", "compare_pruned_ranks"),
    "bounds": ("bounds", "BoundsArguments", "check_bounds"),
    "form-speed": ("form_speed", "FormSpeedArguments", "compare_speeds"),
    "form-numerics": ("form_numerics", "FormNumericsArguments", "measure_numerics"),
    "architectures": ("architectures", "ArchitecturesArguments", "sweep_architectures"),
    "damaged-checkpoints": ("damaged_checkpoints", "DamagedArguments", "try_damaged_checkpoints"),
    "kills": ("kills", "KillsArguments", "kill_runs"),
    "vllm": ("vllm_speed", "VllmSpeedArguments", "compare_in_vllm"),
    "exports": ("export_speed", "ExportSpeedArguments", "compare_exports"),
    "experts": ("experts", "ExpertsArguments", "compare_experts"),
    "assisted": ("assisted", "AssistedArguments", "compare_assisted"),
    "streaming": ("streaming", "StreamingArguments", "compare_streaming"),
}


class _Commands(Mapping[str, Command]):
    """Imports a comparison where it is asked for: an engine's environment has not what all need."""

    def __getitem__(self, name: str) -> Command:
        module, arguments, run = _PLACES[name]
        found = importlib.import_module(f"benchmarks.{module}")
        return getattr(found, arguments), getattr(found, run)

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)

    def __contains__(self, name: object) -> bool:
        return name in _PLACES


COMMANDS = _Commands()

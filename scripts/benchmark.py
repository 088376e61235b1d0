r"""Comparisons whose figures are in the docs; each writes its rows as JSON with their provenance.

python scripts/benchmark.py metrics --calibration FILE --evaluation FILE --output result.json
python scripts/benchmark.py systems --calibration FILE --evaluation FILE --folder rows
python scripts/benchmark.py show --rows rows --picture systems.svg
python scripts/benchmark.py recipe --calibration FILE "FILE + OTHER:0.25" --evaluation FILE OTHER \
    --questions arc_easy.jsonl piqa.jsonl --output_dir rows
python scripts/benchmark.py bytes --calibration FILE --evaluation FILE OTHER --megabytes 200
python scripts/benchmark.py frontier --calibration FILE --evaluation FILE OTHER --rows int8 0.8
python scripts/benchmark.py frontier-embeddings --model FOLDER --pairs dev.tsv --texts FILE
python scripts/benchmark.py embeddings --model FOLDER --pairs dev.tsv --train_pairs train.tsv \
    --texts FILE --recover_steps 300 --output_dir rows
python scripts/benchmark.py perturbation --calibration FILE --held_out_sequences 8 \
    --param_ratio 0.8 --output perturbation.json --picture perturbation.svg
python scripts/benchmark.py glue --model FOLDER --data_dir GLUE --tasks mrpc rte --folder rows
python scripts/benchmark.py qa --model FOLDER --data_file dev-v1.1.json --questions 2000 \
    --methods dense svd kfac lpaf --param_ratios 0.25 --folder rows
python scripts/benchmark.py pruned-ranks --model FOLDER --data_dir GLUE --task mrpc \
    --final_density 0.25 --output ranks.json --picture ranks.svg
python scripts/benchmark.py bounds --output bounds.json
python scripts/benchmark.py form-speed --output form_speed.json
python scripts/benchmark.py form-numerics --calibration FILE --evaluation FILE --output out.json
python scripts/benchmark.py architectures --output architectures.json --page architectures.md
python scripts/benchmark.py damaged-checkpoints --count 10000 --output damaged_checkpoints.json
python scripts/benchmark.py kills --count 100 --output kills.json
python scripts/benchmark.py vllm --models DENSE COMPRESSED --output vllm_speed.json
python scripts/benchmark.py exports --engine openvino --models DENSE COMPRESSED --output out.json
python scripts/benchmark.py experts --training train.txt --evaluation test.txt --output out.json
python scripts/benchmark.py assisted --model FOLDER --baseline demo --output assisted.json
python scripts/benchmark.py streaming --layers 4 11 22 --dtype float32 --output streaming.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

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
from hf_lowrank.cli.arguments import parse_arguments, user_errors

COMMANDS = {
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


def main() -> None:
    """Runs the comparison named by the first argument."""
    usage = f"usage: benchmark.py {{{','.join(COMMANDS)}}} ..."
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(f"{usage}\n\n{__doc__}\nOptions: benchmark.py NAME --help")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(usage, file=sys.stderr)
        raise SystemExit(2)
    arguments, run = COMMANDS[sys.argv[1]]
    args = parse_arguments(arguments, __doc__, sys.argv[2:])
    with user_errors():
        run(args)


if __name__ == "__main__":
    main()

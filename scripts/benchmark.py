r"""Comparisons whose figures are in the docs; each writes its rows as JSON with their provenance.

python scripts/benchmark.py recovery --calibration FILE --evaluation FILE --output recovery.json
python scripts/benchmark.py glue-size --model FOLDER --data_dir GLUE --tasks mrpc --output size.json
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

from benchmarks.commands import COMMANDS
from hf_lowrank.cli.arguments import parse_arguments, user_errors


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

"""Fine-tune and compress an encoder on a GLUE task.

python scripts/run_glue.py --model FOLDER --task mrpc --method kfac --param_ratio 0.25 \
    --data_dir GLUE_FOLDER --output_dir outputs/mrpc
"""

from __future__ import annotations

import json
from pathlib import Path

from hf_lowrank.arguments import parse_arguments, user_errors
from hf_lowrank.benchmarks.record import provenance
from hf_lowrank.report.schema import jsonable
from hf_lowrank.report.table import align
from hf_lowrank.saving import atomic_folder, check_output_folder
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task
from hf_lowrank.tasks.run import run_task


def main() -> None:
    """Parses, runs, prints, saves."""
    args = parse_arguments(GlueArguments, __doc__)
    with user_errors():
        args.check()
        folder = Path(args.output_dir) if args.output_dir else None
        if folder:
            check_output_folder(folder, overwrite=False)
        task = load_glue_task(args)
        model, report = run_task(task, args)
        print(format_glue(report))
        if folder:
            with atomic_folder(folder) as temporary:
                model.save_pretrained(temporary)
                task.tokenizer.save_pretrained(temporary)
                text = json.dumps(jsonable(provenance() | report), indent=2)
                (temporary / "report.json").write_text(text + "\n", encoding="utf-8")
            print(f"saved to {folder}")


def format_glue(report: dict) -> str:
    """The run's figures as a table."""
    parameters = report["parameters"]
    rows = [["", *report["dense_metrics"]]]
    for name in ("dense_metrics", "uncured_metrics", "metrics"):
        if name in report:
            rows.append([name, *(f"{value:.4f}" for value in report[name].values())])
    kept = parameters["targeted_kept"] / parameters["targeted_dense"]
    return f"{align(rows)}\nkept {parameters['targeted_kept']:,} targeted parameters ({kept:.2%})"


if __name__ == "__main__":
    main()

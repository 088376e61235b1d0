r"""Fine-tune and compress an encoder on a GLUE task.

python scripts/run_glue.py --model FOLDER --task mrpc --method kfac --param_ratio 0.25 \
    --data_dir GLUE_FOLDER --output_dir outputs/mrpc
"""

from __future__ import annotations

from hf_lowrank.cli.task_command import task_command
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task


def main() -> None:
    """Parses, runs, prints, saves."""
    task_command(GlueArguments, load_glue_task, __doc__)


if __name__ == "__main__":
    main()

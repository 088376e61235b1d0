"""Zero-shot tasks through lm-eval's `HFLM` on a model in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.inputs.start_token import start_tokens


def check_harness(include_path: str | None = None) -> None:
    """Refuses where lm-eval or the folder of task files is missing.

    Raises:
        ConfigError: lm-eval is not installed.
        DataError: There is no such folder.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("Tasks need the package lm_eval: pip install lm_eval.")
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"{include_path}: no such folder of task files.")


def run_tasks(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 4,
) -> dict[str, dict[str, float]]:
    """Metrics by task; each text begins with the tokenizer's start token, if it has one.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of lm-eval's tasks, or of those in `include_path`.
        include_path: Folder with task files (.yaml) of one's own, for use offline.
        limit: Examples of each task; None for all.
        batch_size: Examples in a batch.

    Raises:
        ConfigError: lm-eval is not installed.
        DataError: A task is unknown, or its data can't be reached.
    """
    check_harness(include_path)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise DataError(f"lm-eval has no task {', '.join(unknown)}; give --include_path?")
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                add_bos_token=bool(start_tokens(tokenizer)),
            ),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"Tasks {', '.join(tasks)} could not be run: {reason}") from error
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and "stderr" not in name and name != "sample_len"
        }
        for task, metrics in found["results"].items()
    }

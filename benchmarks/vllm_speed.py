"""Speed in vLLM, dense against compressed, on a CPU: reading prompts and writing.

Every model has a process of its own, which waits while another computes: they take turns within a
run, so that what disturbs the machine disturbs all of them. Processor time counts, since others may
use the machine, too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.report.provenance import write_result

WORKER = (sys.executable, "-m", "benchmarks.vllm_worker")
# name: prompts, tokens of each, tokens to write
CELLS = {
    "prefill 1 x 256": (1, 256, 1),
    "prefill 16 x 64": (16, 64, 1),
    "decode 1": (1, 8, 32),
    "decode 16": (16, 8, 32),
}
# One thread, and the engine in the process that is timed.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass
class VllmSpeedArguments:
    """Arguments of the comparison of models in vLLM; run it where vLLM is installed."""

    models: list[str] | None = option(None, "Folders: the dense model, then compressed ones.")
    rounds: int = option(5, "How often each model is timed in each cell; one more warms up.")
    dtype: str = option("bfloat16", "Data type that is served in.")
    eager: bool = option(True, "Without torch.compile, which takes a minute to start.")
    output: str = option("outputs/vllm_speed.json", "JSON file of the result.")


def compare_in_vllm(args: VllmSpeedArguments) -> None:
    """Writes a row for each model and cell.

    Raises:
        ConfigError: There are fewer than two models.
        DataError: vLLM does not start with one of them.
    """
    models = args.models or []
    if len(models) < 2:
        raise ConfigError("models must name a dense model's folder and then a compressed one's.")
    options = {"dtype": args.dtype, "enforce_eager": args.eager, "max_model_len": 320}
    with ExitStack() as stack:
        workers = {}
        for model in models:
            command = [*WORKER, model, json.dumps({**options, "max_num_seqs": 16})]
            workers[model] = stack.enter_context(_started(command))
        timers = {model: partial(_time, model, worker) for model, worker in workers.items()}
        rows = compare_in_turn(timers, CELLS, args.rounds)
    print(format_rows(rows))
    write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


def _started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


def compare_in_turn(
    timers: Mapping[str, Callable[[dict[str, int]], float]],
    cells: Mapping[str, tuple[int, int, int]],
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each cell and model; the models take turns.

    Args:
        timers: By model, the first the one to compare with: seconds of processor time for
            "prompts" of "length" tokens and "new" ones written to each.
        cells: These three by name.
        rounds: Times of each; one more warms up.
    """
    return [row for name, cell in cells.items() for row in _compare(timers, name, cell, rounds)]


def _compare(
    timers: Mapping[str, Callable[[dict[str, int]], float]],
    cell: str,
    sizes: tuple[int, int, int],
    rounds: int,
) -> list[dict[str, Any]]:
    asked = dict(zip(("prompts", "length", "new"), sizes, strict=True))
    times: dict[str, list[float]] = {model: [] for model in timers}
    for _ in range(rounds + 1):
        for model, timer in timers.items():
            times[model].append(timer(asked))
    kept = {model: each[1:] for model, each in times.items()}
    dense = next(iter(kept.values()))
    return [
        {
            "cell": cell,
            **asked,
            "model": Path(model).name,
            "cpu_seconds": each,
            "speedup_best": min(dense) / min(each),
            "speedup_median": statistics.median(a / b for a, b in zip(dense, each, strict=True)),
        }
        for model, each in kept.items()
    ]


def _time(model: str, worker: subprocess.Popen[str], asked: dict[str, int]) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(asked) + "\n")
        worker.stdin.flush()
        return float(json.loads(worker.stdout.readline())["cpu_seconds"])
    except (OSError, ValueError) as error:
        raise DataError(f"{model}: vLLM has ended; its last lines say why.") from error


def format_rows(rows: list[dict[str, Any]]) -> str:
    """A table: how many times faster than the first model each is, best and median of the pairs."""
    lines = ["| | model | CPU seconds | speedup, best / median |", "|---" * 4 + "|"]
    for row in rows:
        cells = [row["cell"], row["model"], f"{min(row['cpu_seconds']):.3f}"]
        cells.append(f"{row['speedup_best']:.2f} / {row['speedup_median']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

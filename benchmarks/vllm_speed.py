"""Speed in vLLM, dense against compressed, on a CPU: reading prompts and writing.

Every model has a process of its own, which waits while another computes: they take turns within a
run, so that what disturbs the machine disturbs all of them. Processor time counts, since others may
use the machine, too.

`random_layers` makes the models: a Llama of TinyLlama's widths and random weights, and its cuts by
the default recipe, with compact factors alone and with two factors. Its vocabulary has the share
of the numbers that TinyLlama's has with 22 blocks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.streaming import StreamingArguments, make_llama
from hf_lowrank import LowRankConfig, compress
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
WAYS: dict[str, dict[str, Any]] = {
    "default": {"measured_prices": False},
    "compact": {"channels": False, "metric": "plain", "rule": "uniform"},
    "factors": {"channels": False, "metric": "plain", "rule": "uniform", "form": "factors"},
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
    random_layers: int = option(0, "Blocks of a random Llama to make and to cut; without models.")
    param_ratio: list[float] = field(
        default_factory=lambda: [0.8, 0.5], metadata={"help": "Sizes of its cuts."}
    )
    ways: list[str] = field(
        default_factory=lambda: list(WAYS), metadata={"help": f"How it is cut: {', '.join(WAYS)}."}
    )
    rounds: int = option(5, "How often each model is timed in each cell; one more warms up.")
    dtype: str = option("bfloat16", "Data type that is served in.")
    eager: bool = option(True, "Without torch.compile, which takes a minute to start.")
    output: str = option("outputs/vllm_speed.json", "JSON file of the result.")


def compare_in_vllm(args: VllmSpeedArguments) -> None:
    """Writes a row for each model and cell.

    Raises:
        ConfigError: There are fewer than two models, or models where they are to be made.
        DataError: vLLM does not start with one of them.
    """
    models = args.models or []
    if args.random_layers and (models or set(args.ways) - set(WAYS)):
        raise ConfigError(f"random_layers goes without models, and ways are {', '.join(WAYS)}.")
    if len(models) < 2 and not args.random_layers:
        raise ConfigError("models must name a dense model's folder and then a compressed one's.")
    options = {"dtype": args.dtype, "enforce_eager": args.eager, "max_model_len": 320}
    with ExitStack() as stack:
        if args.random_layers:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            models = make_models(Path(place), args)
        workers = {}
        for model in models:
            command = [*WORKER, model, json.dumps({**options, "max_num_seqs": 16})]
            workers[model] = stack.enter_context(_started(command))
        timers = {model: partial(_time, model, worker) for model, worker in workers.items()}
        rows = compare_in_turn(timers, CELLS, args.rounds)
    print(format_rows(rows))
    write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


def make_models(place: Path, args: VllmSpeedArguments) -> list[str]:
    """Writes the random Llama and its cuts into folders of their own; returns these."""
    shape = StreamingArguments()
    layers = args.random_layers
    shape.vocabulary = shape.vocabulary * layers // 22
    dense = place / "dense"
    make_llama(dense, shape, layers)
    folders = [str(dense)]
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocabulary, (4, 1, 256), generator=drawn)
    batches = [{"input_ids": window} for window in tokens]
    for way in args.ways:
        for ratio in args.param_ratio:
            model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
            compress(model, LowRankConfig(param_ratio=ratio, **WAYS[way]), batches)
            model.to(torch.bfloat16).save_pretrained(place / f"{way}-{ratio:g}")
            folders.append(str(place / f"{way}-{ratio:g}"))
    return folders


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

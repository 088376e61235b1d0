"""Compression block by block against compression in memory: peak memory and time by model size.

A random Llama is written to disk block by block, so that making it takes no more memory than the
run that is measured. Each run is a process of its own. Linux tells apart what a process has
allocated (anonymous memory) and what it has mapped of files (checkpoints, stored factors), which
the system takes back when it needs the room.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_lowrank import LowRankConfig, compress, compress_checkpoint
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.report.provenance import write_result

_SCALE = 0.02
_SAMPLE_SECONDS = 0.02


@dataclass
class StreamingArguments:
    """Arguments of the comparison; by default the blocks are those of TinyLlama-1.1B."""

    layers: list[int] = field(
        default_factory=lambda: [4, 11, 22], metadata={"help": "Numbers of blocks, a size each."}
    )
    in_memory: list[int] = field(
        default_factory=list, metadata={"help": "Those that are compressed in memory, too."}
    )
    hidden_size: int = option(2048, "Width of the hidden states.")
    intermediate_size: int = option(5632, "Channels of the feed-forwards.")
    heads: int = option(32, "Attention heads; an eighth as many keys and values.")
    vocabulary: int = option(32000, "Tokens that the model knows.")
    dtype: str = option("auto", "What is computed in; the checkpoint is in bfloat16.")
    sequences: int = option(8, "Token windows for calibration.")
    sequence_length: int = option(256, "Tokens in each.")
    param_ratio: float = option(0.8, "Kept share of the parameters.")
    channels: bool = option(True, "Take out channels, too.")
    folder: str | None = option(None, "Where models are made; by default a temporary folder.")
    output: str = option("outputs/streaming.json", "JSON file of the result.")

    def check(self) -> None:
        """Refuses what can't be measured.

        Raises:
            ConfigError: There is no size, or `in_memory` names one that `layers` does not.
        """
        if not self.layers or set(self.in_memory) - set(self.layers):
            raise ConfigError("layers names the sizes, and in_memory some of these.")


def compare_streaming(args: StreamingArguments) -> None:
    """Writes peak memory and time of each size and way."""
    args.check()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        for layers in args.layers:
            dense = Path(place) / f"llama-{layers}"
            size = make_llama(dense, args, layers)
            for streamed in (True, *([False] if layers in args.in_memory else [])):
                row: dict[str, Any] = {"layers": layers, "streamed": streamed, **size}
                row |= _in_a_process(dense, args, streamed)
                row["anonymous_share"] = row["peak_anonymous_bytes"] / size["checkpoint_bytes"]
                rows.append(row)
                print(json.dumps(row), flush=True)
            shutil.rmtree(dense)
    write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


def make_llama(folder: Path, args: StreamingArguments, layers: int) -> dict[str, int]:
    """Writes a random Llama in bfloat16, a file for each block, and returns its size."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=args.heads,
        num_key_value_heads=max(1, args.heads // 8),
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    places: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    parameters = size = 0
    parts = {f"model.layers.{i}.": block for i, block in enumerate(model.model.layers)}
    for number, (prefix, part) in enumerate([*parts.items(), ("", model)]):
        state = {
            prefix + name: _random(name, parameter, generator)
            for name, parameter in part.named_parameters()
            if prefix or not name.startswith("model.layers.")
        }
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(state, file)
        parameters += sum(tensor.numel() for tensor in state.values())
        size += (folder / file).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    return {"parameters": parameters, "checkpoint_bytes": size}


def _random(name: str, parameter: nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    drawn = torch.empty(parameter.shape, dtype=torch.bfloat16)
    return drawn.normal_(std=_SCALE, generator=generator)


def _in_a_process(dense: Path, args: StreamingArguments, streamed: bool) -> dict[str, Any]:
    """What `measured_run` finds in a fresh process."""
    settings = json.dumps([str(dense), vars(args), streamed])
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", settings],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": paths},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured_run(dense: Path, args: StreamingArguments, streamed: bool) -> dict[str, Any]:
    """Compresses a checkpoint, and returns peak memory, seconds and predicted loss."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, args.sequence_length)
    batches = [
        {"input_ids": torch.randint(args.vocabulary, shape, generator=generator)}
        for _ in range(args.sequences)
    ]
    config = LowRankConfig(
        param_ratio=args.param_ratio, channels=args.channels, measured_prices=False
    )
    out = dense.with_name("out")
    start, cpu = time.perf_counter(), time.process_time()
    with _peaks() as peaks:
        if streamed:
            report = compress_checkpoint(dense, out, config, batches, dtype=args.dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(dense, dtype=args.dtype)
            report = compress(model, config, batches)
            model.save_pretrained(out)
    shutil.rmtree(out)
    return {
        **peaks,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "phases": report.seconds,
        "kept_parameters": report.parameters.targeted_kept,
        "predicted_loss_difference": report.predicted_loss_difference,
    }


@contextmanager
def _peaks() -> Iterator[dict[str, float]]:
    """Fills in this process's peaks of resident and of anonymous memory, and what it began with."""
    found: dict[str, float] = {"bytes_before": _status("RssAnon")}
    most, ended = [0.0], threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            most[0] = max(most[0], _status("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield found
    finally:
        ended.set()
        sampler.join()
        found |= {"peak_anonymous_bytes": most[0], "peak_resident_bytes": _status("VmHWM")}


def _status(name: str) -> float:
    """A line of Linux's status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _main(settings: str) -> None:
    dense, values, streamed = json.loads(settings)
    args: Mapping[str, Any] = values
    print(json.dumps(measured_run(Path(dense), StreamingArguments(**args), streamed)))


if __name__ == "__main__":
    _main(sys.argv[1])

"""Speed of exported models, dense against compressed, on a CPU: reading a prompt and writing.

All models run in this process, in turn, in one engine: run it once for each engine, and once with
"torch" on the checkpoints themselves. Processor time counts, since others may use the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.vllm_speed import compare_in_turn, format_rows
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.inputs.sources import load_any_causal_lm
from hf_lowrank.report.provenance import write_result
from hf_lowrank.serving.packages import check_packages
from hf_lowrank.value_checks import check_choice

# name: prompts, tokens of each, tokens to write
CELLS = {"prefill 1 x 256": (1, 256, 1), "decode 1": (1, 8, 32)}
Writer = Callable[[torch.Tensor, int], object]


@dataclass
class ExportSpeedArguments:
    """Arguments of the comparison of exported models."""

    engine: str = option("openvino", "What runs them: openvino, onnx, or torch (checkpoints).")
    models: list[str] | None = option(
        None, "Folders of scripts/export.py: the dense model's, then compressed ones'."
    )
    rounds: int = option(5, "How often each model is timed in each cell; one more warms up.")
    threads: int = option(1, "Threads of the engine.")
    output: str = option("outputs/export_speed.json", "JSON file of the result.")


def compare_exports(args: ExportSpeedArguments) -> None:
    """Writes a row for each model and cell.

    Raises:
        ConfigError: There are fewer than two models, the engine is unknown or not installed.
    """
    check_choice("engine", args.engine, tuple(ENGINES))
    models = args.models or []
    if len(models) < 2:
        raise ConfigError("models must name a dense model's folder and then a compressed one's.")
    torch.set_num_threads(args.threads)
    timers = {
        model: partial(_seconds, ENGINES[args.engine](model, args.threads)) for model in models
    }
    rows = compare_in_turn(timers, CELLS, args.rounds)
    print(format_rows(rows))
    write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


@torch.inference_mode()
def _seconds(write: Writer, asked: dict[str, int]) -> float:
    torch.manual_seed(0)
    prompt = torch.randint(3, 90, (asked["prompts"], asked["length"]))  # known to any vocabulary
    start = time.process_time()
    write(prompt, asked["new"])
    return time.process_time() - start


def _by_generate(model: Any) -> Writer:  # noqa: ANN401
    def write(prompt: torch.Tensor, new: int) -> None:
        mask = torch.ones_like(prompt)
        how = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
        model.generate(input_ids=prompt, attention_mask=mask, pad_token_id=0, **how)

    return write


def _torch(model: str, threads: int) -> Writer:
    return _by_generate(load_any_causal_lm(model, "float32")[0])


def _openvino(model: str, threads: int) -> Writer:
    check_packages("OpenVINO files", ("optimum.intel",), "openvino")
    from optimum.intel import OVModelForCausalLM

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return _by_generate(OVModelForCausalLM.from_pretrained(model, ov_config=settings))


def _onnx(model: str, threads: int) -> Writer:
    check_packages("onnx files", ("onnxruntime",), "onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(Path(model) / "model.onnx", options)
    shapes = {each.name: each.shape for each in session.get_inputs() if "past" in each.name}

    def write(prompt: torch.Tensor, new: int) -> None:
        count, total = prompt.shape
        sizes = {name: (count, shape[1], 0, shape[3]) for name, shape in shapes.items()}
        cache = {name: torch.zeros(size).numpy() for name, size in sizes.items()}
        for _ in range(new):
            inputs = {
                "input_ids": prompt.numpy(),
                "attention_mask": torch.ones(count, total, dtype=torch.long).numpy(),
                "position_ids": torch.arange(total - prompt.shape[1], total)
                .repeat(count, 1)
                .numpy(),
            }
            logits, *present = session.run(None, inputs | cache)
            cache = dict(zip(cache, present, strict=True))
            prompt, total = torch.from_numpy(logits[:, -1:]).argmax(-1), total + 1

    return write


ENGINES: dict[str, Callable[[str, int], Writer]] = {
    "openvino": _openvino,
    "onnx": _onnx,
    "torch": _torch,
}

"""Reads what a run of compress_llm.py saved, without the library's code."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINT_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_lowrank.py",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def read_report(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "report.json").read_text("utf-8")
    report: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return report


def file_sizes(folder: Path) -> dict[str, int]:
    tensors = load_file(folder / "model.safetensors").values()
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def mean_loss(folder: Path, text: Path, sequences: int = 16, length: int = 32) -> float:
    """Mean next-token loss over windows spread evenly over a text, without the library's code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor(tokenizer(text.read_text("utf-8"))["input_ids"])
    stride = (len(tokens) - length) // (sequences - 1)
    windows = torch.stack([tokens[i * stride :][:length] for i in range(sequences)])
    with torch.no_grad():
        logits = model(windows).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))

"""Causal language models whose weights stay on disk: modules on meta, and the files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig

from hf_lowrank.errors import DataError
from hf_lowrank.format.headers import resolve_file, weight_files
from hf_lowrank.inputs.architectures import language_model_class
from hf_lowrank.inputs.hub import reading
from hf_lowrank.inputs.sources import DEMO, DTYPES, check_place, demo_folder, refuse_quantized


def open_causal_lm(
    source: str, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[nn.Module, list[Path]]:
    """A dense causal language model without its weights, in eval mode.

    Args:
        source: A Hub id, a local folder with safetensors files, or "demo".
        dtype: As for `load_causal_lm`: the type that weights will have once they are read.
        trust_remote_code: Whether code that lies beside the weights may run.

    Returns:
        The model, with parameters on the meta device and real buffers, and its safetensors files.

    Raises:
        DataError, TargetError, CheckpointError: As for `load_causal_lm`, or there are no
            safetensors files.
    """
    check_place(dtype, "cpu")
    if source.endswith(".gguf"):
        raise DataError(
            f"{source}: a .gguf file is read as a whole; load it once and save_pretrained it as "
            "safetensors, or compress it in memory."
        )
    source = str(demo_folder()) if source == DEMO else source
    refuse_quantized(source)
    with reading(source, "model folder", trust_remote_code):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        auto_class = language_model_class(source, config)
        files = [resolve_file(source, name) for name in weight_files(source, {})]
        wanted: Any = DTYPES[dtype]
        if wanted == "auto":
            wanted = getattr(config, "dtype", None) or _stored_dtype(files[0])
        with init_empty_weights(include_buffers=False):
            model = auto_class.from_config(
                config, dtype=wanted, trust_remote_code=trust_remote_code
            )
        model.tie_weights()  # what is tied is one parameter on meta, too
        if model.can_generate():
            with suppress(OSError):  # older checkpoints have none; the model has made one already
                model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval(), files


def _stored_dtype(path: Path) -> torch.dtype:
    """Type of the first floats in a file."""
    with safe_open(path, framework="pt") as file:
        tensors = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

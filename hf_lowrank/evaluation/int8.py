"""Weight-only int8 on top of the factors, by torchao, for inference."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from hf_lowrank.errors import ConfigError


def check_int8() -> None:
    """Refuses where torchao is missing.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("int8 needs the package torchao: pip install torchao.")


def quantize_int8_(model: nn.Module) -> None:
    """Weights of all linear layers but the head to int8, one scale for each row; in place.

    The factors of a compressed model are linear layers like any other. Activations stay as they
    are. For inference only; quantize after loading, a quantized model is not saved as a low-rank
    checkpoint.

    Args:
        model: A transformers model, dense or compressed.

    Raises:
        ConfigError: torchao is not installed.
    """
    check_int8()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, nn.Linear) and module is not head,
    )


def num_bytes(tensor: torch.Tensor) -> int:
    """Memory of a tensor, of all its parts if it is a quantized one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)  # PyTorch's protocol of such tensors
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    parts, _ = flatten()
    return sum(num_bytes(getattr(tensor, part)) for part in parts)

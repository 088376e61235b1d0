"""Compressed encoders as ONNX files that onnxruntime runs, in fp32 and int8."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowrank.measuring.embeddings import EmbeddingLoss
from hf_lowrank.measuring.items import eval_mode
from hf_lowrank.serving.packages import check_packages

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx() -> None:
    """Refuses an export without its packages.

    Raises:
        ConfigError: With what is missing.
    """
    check_packages("onnx files", _PACKAGES, "onnx")


class _Embedder(nn.Module):
    """An encoder whose inputs come one by one, and whose outputs are tensors."""

    def __init__(self, model: nn.Module, names: list[str], loss: EmbeddingLoss) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.loss = loss

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = dict(zip(self.names, values, strict=True))
        outputs = self.model(**batch)
        return outputs.last_hidden_state, self.loss.pooled(self.model, outputs, batch)


def export_onnx(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    loss: EmbeddingLoss,
    path: Path,
) -> None:
    """Writes an encoder with its pooling as an ONNX file.

    Its inputs are those that the tokenizer makes, its outputs `last_hidden_state`, shape (batch,
    length, size), and `sentence_embedding`, shape (batch, size); batch and length are free.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        loss: Its pooling, and whether embeddings are normalised.
        path: Where to.

    Raises:
        ConfigError: A package is missing.
    """
    check_onnx()
    sample = dict(tokenizer(["one", "two and more"], padding=True, return_tensors="pt"))
    device = next(model.parameters()).device
    names = list(sample)
    outputs = ["last_hidden_state", "sentence_embedding"]
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    with eval_mode(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        torch.onnx.export(
            _Embedder(model, names, loss).eval(),
            tuple(value.to(device) for value in sample.values()),
            str(path),
            input_names=names,
            output_names=outputs,
            dynamic_shapes=(tuple(axes for _ in names),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def quantize_onnx(path: Path, target: Path) -> None:
    """Writes a copy with weights in int8 and activations quantized as they come.

    Both unsigned: sums of signed weights times unsigned activations saturate on processors without
    VNNI, and embeddings of MiniLM there kept a cosine of 0.55 to those in fp32, with these 0.98.

    Args:
        path: What `export_onnx` wrote.
        target: Where to.

    Raises:
        ConfigError: A package is missing.
    """
    check_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, target, weight_type=QuantType.QUInt8, per_channel=True)

"""Causal language models as ONNX files with a key-value cache, for onnxruntime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

_LENGTHS = (2, 3)  # of the example: tokens in the cache, tokens that are new


class _Decoder(nn.Module):
    """A language model whose cache goes in and out as tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
        )
        return outputs.logits, *_tensors(outputs.past_key_values)


def _tensors(cache: Any) -> list[torch.Tensor]:  # noqa: ANN401
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def write_onnx_decoder(model: Any, path: Path) -> None:  # noqa: ANN401
    """Writes a causal language model as one ONNX file with a cache.

    Inputs and outputs have the names that optimum and onnxruntime-genai use: `input_ids`,
    `attention_mask` over cached and new tokens, `position_ids` of the new ones,
    `past_key_values.0.key`, ... of shape (batch, heads, tokens, size); `logits`, `present.0.key`.
    The first call has 0 cached tokens.

    Args:
        model: Of transformers, in eval mode, on the CPU.
        path: Where to; more than 2 GB go into a file beside it.
    """
    cached, new = _LENGTHS
    ids = torch.ones(2, new, dtype=torch.long)
    mask = torch.ones(2, cached + new, dtype=torch.long)
    places = torch.arange(cached, cached + new).repeat(2, 1)
    with torch.no_grad():
        past = _tensors(model(input_ids=ids[:, :cached], use_cache=True).past_key_values)
    layers = range(len(past) // 2)
    names = [f"past_key_values.{i}.{part}" for i in layers for part in ("key", "value")]
    axes = {0: "batch", 1: "length"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        torch.onnx.export(
            _Decoder(model).eval(),
            (ids, mask, places, past),
            str(path),
            input_names=["input_ids", "attention_mask", "position_ids", *names],
            output_names=["logits", *(n.replace("past_key_values", "present") for n in names)],
            dynamic_shapes=(
                axes,
                {0: "batch", 1: "total"},
                axes,
                [{0: "batch", 2: "past"} for _ in past],
            ),
            dynamo=True,
            external_data=False,
            verbose=False,
        )

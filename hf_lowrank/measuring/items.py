"""What a loss is computed on and handed back as: one number for each item of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

Batch = Mapping[str, torch.Tensor]

IGNORED = -100

_CAUSAL_MODELS = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_IMAGE_MODELS = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())


@dataclass(frozen=True)
class ItemLosses:
    """Losses of one batch.

    Attributes:
        sums: Loss summed over the scored positions of each item, nats, fp32, shape (batch,).
        counts: Scored positions of each item, shape (batch,); 1 for sentence-level tasks.
    """

    sums: torch.Tensor
    counts: torch.Tensor


LossFunction = Callable[[nn.Module, Batch], ItemLosses]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of the block; afterwards every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model is a causal language model, judged by its class and those above it.

    One that also reads images is one, too.
    """
    reads_images = is_one_of(model, _IMAGE_MODELS) and not is_encoder_decoder(model)
    return reads_images or is_one_of(model, _CAUSAL_MODELS)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


def is_one_of(model: nn.Module, names: frozenset[str]) -> bool:
    """Whether the model's class or one above it has one of these names."""
    return any(each.__name__ in names for each in type(inner_model(model)).__mro__)


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and PEFT."""
    if any(each.__name__ == "PeftModel" for each in type(model).__mro__):
        return inner_model(model.get_base_model())  # type: ignore[operator]
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else inner_model(compiled)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; those on meta, of which there is nothing, do not count."""
    places = (parameter.device for parameter in model.parameters())
    return next((each for each in places if each.type != "meta"), torch.device("cpu"))


def config_of(model: nn.Module) -> object:
    """The model's config; None where it has none."""
    return getattr(model, "config", None)


def without_labels(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch less its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, sample: bool) -> torch.Tensor:
    """Loss per row in fp32; ignored rows give 0. Sampled labels keep the ignored rows."""
    logits = logits.float()
    if sample:
        # Gumbel-max: one draw from softmax(logits) per row.
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-20, 1 - 1e-7)))
        drawn = (logits.detach() + noise).argmax(dim=-1)
        targets = torch.where(targets == IGNORED, targets, drawn)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

"""Whether a loss read off a model's class and logits is the model's own: asked once for each model.

The first items of a batch are run with labels, and the model's loss is compared. What differs is
refused rather than guessed: speech recognition (CTC), ELECTRA's discriminator, and whatever else.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring.items import (
    Batch,
    ItemLosses,
    config_of,
    eval_mode,
    inner_model,
)
from hf_lowrank.measuring.projection import plain_forward, probe_of


@dataclass(frozen=True)
class LabelPlaces:
    """Where a causal language model's labels stand.

    Attributes:
        shifted: The label of a position is predicted by the one before it, as in most models. In
            decoders of translation models it is predicted by the position itself.
        refusal: Why tokens alone are no labels for this model; empty if they are.
        is_known: Whether the model's own loss is one of the two.
    """

    shifted: bool
    refusal: str = ""
    is_known: bool = True


_PLACES: weakref.WeakKeyDictionary[nn.Module, LabelPlaces] = weakref.WeakKeyDictionary()
_REFUSALS: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def label_places(model: nn.Module, batch: Batch) -> LabelPlaces:
    """Found out on up to 4 tokens of the batch, once for each model.

    Raises:
        ConfigError: The batch has tokens alone, and the model sees the tokens that it would have
            to predict; or it has labels, and the model's loss on them is another.
    """
    places = known_places(model, batch)
    if "labels" in batch and not places.is_known:
        raise ConfigError(_refusal(model, "is not the cross-entropy of its labels"))
    if "labels" not in batch and places.refusal:
        raise ConfigError(places.refusal)
    return places


def known_places(model: nn.Module, batch: Batch) -> LabelPlaces:
    """See `label_places`; refuses nothing."""
    if model not in _PLACES:
        _PLACES[model] = _find_places(model, batch)
    return _PLACES[model]


@torch.no_grad()
def _find_places(model: nn.Module, batch: Batch) -> LabelPlaces:
    probe, forward = probe_of(model, batch), plain_forward(model)
    size = next(iter(probe.values())).shape[1]
    made_up = torch.arange(size, device=next(iter(probe.values())).device)[None]
    labels = probe.get("input_ids", made_up)
    options: dict[str, Any] = {"use_cache": False}
    if getattr(config_of(model), "output_router_logits", False):
        options["output_router_logits"] = False  # the balance of experts is no part of the text's
    with eval_mode(model):
        try:
            output = forward(**probe, **options, labels=labels)
            own, logits = output.loss, output.logits.float()
        except (TypeError, ValueError, RuntimeError, IndexError):
            own, logits = None, forward(**probe, **options).logits.float()
        if not bool(logits.isfinite().all()):
            return LabelPlaces(True)  # broken weights show in the loss
        if own is None or logits.shape[1] != size or size < 2:
            return LabelPlaces(True, _refusal_of_sight(model, probe, logits))
        losses = {
            True: F.cross_entropy(logits[0, :-1], labels[0, 1:]),
            False: F.cross_entropy(logits[0], labels[0]),
        }
        shifted = min(losses, key=lambda each: abs(float(losses[each] - own)))
        is_known = _agree(model, float(own), float(losses[shifted]))
        if shifted and is_known:
            return LabelPlaces(True)
        return LabelPlaces(shifted, _refusal_of_sight(model, probe, logits), is_known)


def _refusal_of_sight(
    model: nn.Module, probe: dict[str, torch.Tensor], logits: torch.Tensor
) -> str:
    """Empty if no position's logits depend on the token after it."""
    changed = {name: value.clone() for name, value in probe.items()}
    for value in changed.values():
        value[:, -1] += 1
        if not value.is_floating_point():
            value[:, -1] %= logits.shape[-1]
    found = plain_forward(model)(**changed, use_cache=False).logits.float()
    allowed = _tolerance(model) * float(logits.abs().max())
    if torch.allclose(found[:, :-1], logits[:, :-1], rtol=0.0, atol=allowed):
        return ""
    return _refusal(model, "is not on the next token, which it can see")


def refusal_of_head(
    model: nn.Module, batch: Batch, compute: Callable[[Any, Batch], tuple[Batch, ItemLosses]]
) -> str:
    """Why the loss read off a head's logits is not the model's own; empty if it is.

    A model whose forward pass takes no labels has no own loss. Two items of the batch are read,
    once for each model.

    Args:
        model: A model with a head.
        batch: Its inputs, with or without labels.
        compute: From the model's outputs and inputs to the inputs with labels, made up where there
            are none, and the loss on them.
    """
    if model not in _REFUSALS:
        forward = type(inner_model(model)).forward
        if "labels" not in inspect.signature(forward).parameters:
            return ""
        refusal = _compare(model, {name: value[:2] for name, value in batch.items()}, compute)
        if refusal is None:
            return ""
        _REFUSALS[model] = refusal
    return _REFUSALS[model]


@torch.no_grad()
def _compare(
    model: nn.Module, few: Batch, compute: Callable[[Any, Batch], tuple[Batch, ItemLosses]]
) -> str | None:
    """See `refusal_of_head`; None if nothing could be compared."""
    config: Any = config_of(model)
    problem = getattr(config, "problem_type", None)
    with eval_mode(model):
        try:
            outputs = plain_forward(model)(**few)
            labelled, found = compute(outputs, few)
            own = (outputs if "labels" in few else plain_forward(model)(**labelled)).loss
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return _refusal(model, f"can't be had of these batches ({error})")
        finally:
            if hasattr(config, "problem_type"):
                config.problem_type = problem  # heads note there what their labels look like
    if own is None or not int(found.counts.sum()):
        return None
    mean = float(found.sums.sum() / found.counts.sum())
    if not math.isfinite(mean):  # broken weights show in the loss
        return None
    if _agree(model, float(own), mean):
        return ""
    return _refusal(model, f"is {float(own):.4g} where the shape of its logits says {mean:.4g}")


def _agree(model: nn.Module, own: float, found: float) -> bool:
    return abs(own - found) <= _tolerance(model) * max(abs(own), 0.1)


def _tolerance(model: nn.Module) -> float:
    """Relative, for losses and logits; those of 16 bits round more."""
    is_single = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return 0.001 if is_single else 0.03


def _refusal(model: nn.Module, why: str) -> str:
    return f"{type(inner_model(model)).__name__}: its own loss {why}; pass a loss_function."

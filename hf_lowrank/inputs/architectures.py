"""What a checkpoint says it is, held against what it is read as: no head is dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from hf_lowrank.errors import DataError

# Buffers that old checkpoints hold and models make again; transformers knows most of them itself.
_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|causal_mask|inv_freq|position_ids|attn\.bias|attention\.bias)$"
)


class Kind(NamedTuple):
    """What a checkpoint is read as: a name for messages, and the classes of transformers."""

    name: str
    classes: frozenset[str]


def _names(*mappings: Mapping[str, str | Collection[str]]) -> frozenset[str]:
    entries = [entry for mapping in mappings for entry in mapping.values()]
    return frozenset(n for each in entries for n in ([each] if isinstance(each, str) else each))


_BODIES = _names(MODEL_MAPPING_NAMES)
_TEXT_ONLY = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_WITH_IMAGES = _names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - _TEXT_ONLY
LANGUAGE_MODEL = Kind("causal language model", _TEXT_ONLY | _WITH_IMAGES)
CLASSIFIER = Kind("sequence classifier", _names(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES))


def language_model_class(source: str, config: Any) -> Any:  # noqa: ANN401
    """The auto class that reads all of a language model, with the vision tower that it may have.

    Raises:
        DataError: The config is of an encoder-decoder, or names a class with another head.
    """
    name = refuse_other_head(source, config, LANGUAGE_MODEL)
    if name not in _WITH_IMAGES:
        return AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(
            f"{source}: holds a {name}, an encoder-decoder; a causal language model is needed."
        )
    return AutoModelForImageTextToText


def refuse_other_head(source: str, config: Any, kind: Kind) -> str | None:  # noqa: ANN401
    """Refuses a class of transformers that has a head of another kind; one without a head passes.

    Args:
        source: Where the model is, for the message.
        config: Names the class; one that transformers does not have is left to `refuse_left_over`.
        kind: What is needed.

    Returns:
        The class, if the config names one.

    Raises:
        DataError: With both.
    """
    listed = getattr(config, "architectures", None)
    name = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(name, str):
        return None
    if name in kind.classes | _BODIES or not hasattr(transformers, name):
        return name
    raise DataError(
        f"{source}: holds a {name}, not a {kind.name}, so its head would be lost; load it with its "
        "own class and give it to hf_lowrank.compress."
    )


def refuse_left_over(source: str, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that holds more than the model has, but for buffers.

    Args:
        source: Where the model is, for the message.
        model: What was loaded.
        info: The loading info of `from_pretrained`.

    Raises:
        DataError: With the first tensor that has no place.
    """
    names = sorted(name for name in info["unexpected_keys"] if not _BUFFERS.search(name))
    if names:
        raise DataError(
            f"{source}: {type(model).__name__} has no place for {len(names)} of its tensors, for "
            f"example {names[0]}, which would be lost; load it with the class that saved it and "
            "give it to hf_lowrank.compress."
        )

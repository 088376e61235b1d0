"""Tokenizer and undecided model of a task, from the Hub or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.inputs.hub import prefer_offline_if_unreachable
from hf_lowrank.tasks.task_arguments import TaskArguments

_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


def load_tokenizer(model: str) -> Any:  # noqa: ANN401
    """A model's tokenizer.

    Raises:
        DataError: There is no such folder, and no such model on the Hub or no Hub.
    """
    if not Path(model).is_dir():
        prefer_offline_if_unreachable()
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{model}: no such folder, and the Hub has no such model or can't be reached; "
            f"offline, give a local folder. ({reason})"
        ) from error


def check_max_length(args: TaskArguments) -> None:
    """Refuses examples that are longer than the model's positions.

    Raises:
        ConfigError: With both lengths.
    """
    config = AutoConfig.from_pretrained(args.model)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and 0 < limit < args.max_length:
        raise ConfigError(
            f"max_length {args.max_length} exceeds the {limit} positions of {args.model}."
        )


def new_model(args: TaskArguments, model_class: Any, **changes: Any) -> nn.Module:  # noqa: ANN401
    """The pretrained body in fp32 with a fresh head, its config changed as given."""
    config = AutoConfig.from_pretrained(args.model, **changes)
    for name in _ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, args.attention_dropout)
    model: nn.Module = model_class.from_pretrained(
        args.model, config=config, dtype=torch.float32, attn_implementation=attention(args)
    )
    return model


def attention(args: TaskArguments) -> str | None:
    """Transformers' implementation of attention to train with; None: the model's default.

    The backward pass of PyTorch's fused attention under bf16 on a CPU takes five times as long as
    that of the plain one for sequences of about a hundred tokens: a third of a training step.
    """
    return "eager" if args.bf16 and not torch.cuda.is_available() else None

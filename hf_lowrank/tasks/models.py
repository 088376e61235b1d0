"""The undecided model of a task, from the Hub or a folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from hf_lowrank.errors import ConfigError
from hf_lowrank.inputs.hub import reading
from hf_lowrank.tasks.task_arguments import TaskArguments

_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


def check_max_length(args: TaskArguments) -> None:
    """Refuses examples that are longer than the model's positions.

    Raises:
        ConfigError: With both lengths.
        DataError: The model's config can't be read.
    """
    config = model_config(args)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and 0 < limit < args.max_length:
        raise ConfigError(
            f"max_length {args.max_length} exceeds the {limit} positions of {args.model}."
        )


def model_config(args: TaskArguments, **changes: Any) -> Any:  # noqa: ANN401
    """The model's config, changed as given.

    Raises:
        DataError: It can't be read, or needs code that may not run.
    """
    trusted = args.trust_remote_code
    with reading(args.model, "model folder", trusted):
        return AutoConfig.from_pretrained(args.model, trust_remote_code=trusted, **changes)


def new_model(args: TaskArguments, model_class: Any, **changes: Any) -> nn.Module:  # noqa: ANN401
    """The pretrained body in fp32 with a fresh head, its config changed as given.

    Raises:
        DataError: The model can't be read, or needs code that may not run.
    """
    config = model_config(args, **changes)
    for name in _ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, args.attention_dropout)
    with reading(args.model, "model folder", args.trust_remote_code):
        model: nn.Module = model_class.from_pretrained(
            args.model,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention(args),
            trust_remote_code=args.trust_remote_code,
        )
    return model


def attention(args: TaskArguments) -> str | None:
    """Transformers' implementation of attention to train with; None: the model's default.

    The backward pass of PyTorch's fused attention under bf16 on a CPU takes five times as long as
    that of the plain one for sequences of about a hundred tokens: a third of a training step.
    """
    return "eager" if args.bf16 and not torch.cuda.is_available() else None

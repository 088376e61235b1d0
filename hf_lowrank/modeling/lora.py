"""LoRA on the factors of a compressed model, by peft (Hu et al., LoRA, ICLR 2022)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_lowrank.errors import ConfigError
from hf_lowrank.format.rebuild import narrowed_layers

FACTORS = ("lowrank_A", "lowrank_B")


def check_peft() -> None:
    """Refuses where peft is missing.

    Raises:
        ConfigError: With what to install.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("LoRA needs the package peft: pip install 'hf-lowrank[peft]'.")


@contextmanager
def lora_on_factors(model: nn.Module, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """The model with a LoRA adapter on every factor and narrowed layer, merged when the block ends.

    The layers keep their names while the block runs. After an exception the adapters are taken
    off without being merged.

    Args:
        model: The compressed model, changed in place.
        rank: Rank of each adapter, and its alpha: `W + B A`.
        seed: Seed of the adapters' random start.

    Yields:
        The adapters' parameters, in fp32.

    Raises:
        ConfigError: peft is not installed.
    """
    check_peft()
    import peft

    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = [*FACTORS, *narrowed_layers(model)]
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, settings)
    try:
        yield [p for name, p in model.named_parameters() if ".lora_" in name]
    except BaseException:
        adapted.unload()
        raise
    else:
        adapted.merge_and_unload(safe_merge=True)
    finally:
        vars(model).pop("peft_config", None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])

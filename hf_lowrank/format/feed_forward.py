"""Feed-forwards of a model, by the names of their layers.

A feed-forward is `y = W_out a(W_in x)`, or `y = W_out (a(W_gate x) * W_up x)`; its channels are the
entries between.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hf_lowrank.errors import TargetError
from hf_lowrank.format.dense_linear import linear_shape

# Layers into the channels, and the output layer, below one module.
_PATTERNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama and most that came after
    (("wi_0", "wi_1"), "wo"),  # T5 1.1
    (("wi",), "wo"),  # T5
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # OPT
    (("fc_in",), "fc_out"),  # GPT-J
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    (("lin1",), "lin2"),  # DistilBERT
    (("intermediate.dense",), "output.dense"),  # BERT
)
# Take statistics over the channels, without a weight that would show it.
_OVER_CHANNELS = ("Gemma3nTextMLP",)


@dataclass(frozen=True)
class FeedForward:
    """Names of a feed-forward's layers.

    Attributes:
        inputs: Layers into the channels: gate and up, or a single one.
        output: The output layer, which reads the channels.
    """

    inputs: tuple[str, ...]
    output: str

    @property
    def names(self) -> tuple[str, ...]:
        """All its layers."""
        return (*self.inputs, self.output)


def find_feed_forwards(
    model: nn.Module, targets: Iterable[str], experts: Iterable[str] = ()
) -> list[FeedForward]:
    """The feed-forwards whose layers are all targeted, in the model's order.

    Left out are those whose channels do not act one by one: where gate and value are one layer, and
    where a norm or the like goes over the channels.

    Args:
        model: The model.
        targets: Names of its targeted layers.
        experts: Names of modules of fused experts that can be narrowed, feed-forwards, too.

    Raises:
        TargetError: There is none of a known kind, and no experts.
    """
    named = named_feed_forwards(model, targets)
    found = [block for parent, block in named if _acts_by_channel(model, parent, block)]
    if not found and not [*experts]:
        known = "; ".join(f"{', '.join(inputs)} and {output}" for inputs, output in _PATTERNS)
        raise TargetError(
            f"{type(model).__name__} has no feed-forward of a known kind among its targeted layers "
            f"({known}), so no channels can be taken out."
        )
    return found


def named_feed_forwards(model: nn.Module, names: Iterable[str]) -> list[tuple[str, FeedForward]]:
    """(parent, block) of all with these layers by name, where what goes in fits what comes out."""
    known = set(names)
    found = []
    for parent, _ in model.named_modules():
        for inputs, output in _PATTERNS:
            full = tuple(f"{parent}.{name}".lstrip(".") for name in (*inputs, output))
            if known.issuperset(full):
                block = FeedForward(full[:-1], full[-1])
                channels = linear_shape(model.get_submodule(block.output))[1]
                into = [linear_shape(model.get_submodule(name))[0] for name in block.inputs]
                found += [(parent, block)] if set(into) == {channels} else []
                break
    return found


def _acts_by_channel(model: nn.Module, parent: str, block: FeedForward) -> bool:
    """Whether no other weight below the block's parent goes over its channels."""
    module = model.get_submodule(parent)
    channels = linear_shape(model.get_submodule(block.output))[1]
    own = {id(p) for name in block.names for p in model.get_submodule(name).parameters()}
    others = [p for p in module.parameters() if id(p) not in own]
    mixes = type(module).__name__ in _OVER_CHANNELS
    return not mixes and all(tuple(p.shape) != (channels,) for p in others)

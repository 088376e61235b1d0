"""What a config leaves open: channels and measured prices, by what is best for a kind of model.

Chosen by docs/results: on causal language models both together are the best at 0.8 and 0.6, on text
of the calibration's kind and of another kind. On embedding models channels are, and prices from
held-out text chose worse; on encoders with a task's labels channels did not help, and such prices
were not tried.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hf_lowrank.compression.options import Texts
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import TargetError
from hf_lowrank.format.feed_forward import find_feed_forwards
from hf_lowrank.measuring.embeddings import embedding_loss
from hf_lowrank.measuring.items import LossFunction, is_causal_lm

RECIPES = {
    "causal language model": {"channels": True, "measured_prices": True},
    "embedding model": {"channels": True, "measured_prices": False},
    "other": {"channels": False, "measured_prices": False},
}


def with_recipe(
    config: LowRankConfig, kind: str = "causal language model", *, measurable: bool = True
) -> LowRankConfig:
    """The config with `channels` and `measured_prices` filled in where they are None.

    Both work on prices towards a size or a loss tolerance; with any other metric, rule or goal,
    and where ranks are replayed, they are off.

    Args:
        config: What to do.
        kind: A key of `RECIPES`.
        measurable: Whether there is held-out text on which prices can be measured.
    """
    on_prices = (config.metric, config.effective_rule) == ("kfac", "price")
    if not on_prices or config.goal == "rank" or config.ranks is not None:
        recipe = {"channels": False, "measured_prices": False}
    else:
        recipe = dict(RECIPES[kind])
        recipe["measured_prices"] &= measurable
    chosen = {name: on for name, on in recipe.items() if getattr(config, name) is None}
    return config.replace(**chosen)


def recipe_of(
    model: nn.Module, config: LowRankConfig, texts: Texts, loss_function: LossFunction | None
) -> LowRankConfig:
    """`with_recipe` for a model and its batches.

    Args:
        model: The dense model.
        config: What to do.
        texts: As given; held-out text is taken off the calibration text where there is none.
        loss_function: A loss of one's own, or None; its labels can't be drawn.
    """
    has_held_out = bool(texts.held_out) or len(texts.calibration or []) > 1
    if embedding_loss(model, loss_function) is not None:
        return with_recipe(config, "embedding model", measurable=has_held_out)
    if not is_causal_lm(model):
        return with_recipe(config, "other")
    return with_recipe(config, measurable=has_held_out and loss_function is None)


def possible_recipe(
    model: nn.Module,
    asked: LowRankConfig,
    found: LowRankConfig,
    targets: Iterable[str],
    experts: Iterable[str] = (),
) -> LowRankConfig:
    """A recipe without channels where nobody asked for them and there are none to take out.

    Args:
        model: The dense model.
        asked: The config as it was given.
        found: What `recipe_of` made of it.
        targets: Names of the layers that can be factorized.
        experts: Names of the modules of fused experts that can be narrowed.
    """
    if asked.channels is None and found.channels:
        try:
            find_feed_forwards(model, targets, experts)
        except TargetError:
            return found.replace(channels=False)
    return found

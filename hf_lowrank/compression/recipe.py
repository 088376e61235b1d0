"""What a config leaves open: channels and measured prices, by what is best for a kind of model.

Chosen by docs/results: on causal language models both together are the best at 0.8 and 0.6, on text
of the calibration's kind and of another kind. On encoders with a task's labels channels did not
help, and prices can't be measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.measuring.losses import Batch, LossFunction, check_distillable, is_causal_lm

RECIPES = {
    "causal language model": {"channels": True, "measured_prices": True},
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
        measurable: Whether there is held-out text and a model on which prices can be measured.
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
    model: nn.Module,
    config: LowRankConfig,
    calibration: Sequence[Batch] | None,
    held_out: Sequence[Batch] | None,
    loss_function: LossFunction | None = None,
) -> LowRankConfig:
    """`with_recipe` for a model and its batches.

    Args:
        model: The dense model.
        config: What to do.
        calibration: Batches for the moments; held-out text is taken off them where there is none.
        held_out: Batches on which prices would be measured, or None.
        loss_function: A loss of one's own, or None; prices are measured for next tokens only.
    """
    if not is_causal_lm(model):
        return with_recipe(config, "other")
    spare = calibration if calibration and len(calibration) > 1 else []
    batches = held_out or spare
    is_measurable = bool(batches) and loss_function is None and _is_measurable(model, batches[0])
    return with_recipe(config, measurable=is_measurable)


def _is_measurable(model: nn.Module, batch: Batch) -> bool:
    try:
        check_distillable(model, batch)
    except Exception:  # what is wrong with the model or the batch, later checks will say
        return False
    return True

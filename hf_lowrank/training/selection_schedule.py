"""When ranks are selected while a model trains, and which size is due then."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.training.training_arguments import LowRankTrainingArguments

_LOGGER = logging.getLogger(__name__)
# A target size is reached after this share of the training; the rest trains what is left.
_SELECTION_SHARE = 2 / 3


def scheduled_ratio(args: LowRankTrainingArguments, state: TrainerState) -> float | None:
    """Where a target size is set: the share of the parameters that is due at this step."""
    if args.target_param_ratio is None:
        return None
    every = args.selection_steps or state.max_steps / args.num_train_epochs
    total = max(1, int(_SELECTION_SHARE * state.max_steps / every + 1e-6))
    done = math.ceil(state.global_step / every - 1e-6)
    return float(args.target_param_ratio ** min(1.0, done / total))


class SelectionSchedule(TrainerCallback):
    """Calls for a selection every `selection_steps` steps, or at an epoch's last step.

    Args:
        select: Selects ranks and cuts.
        start: Called once before the first step.
    """

    def __init__(self, select: Callable[[], object], start: Callable[[], None]) -> None:
        self.select = select
        self.start = start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warns if no selection will be due, and calls `start`."""
        every = _selection_steps(args)
        if every > state.max_steps:
            _LOGGER.warning(
                "selection_steps %d is more than the training's %d steps: no rank is selected.",
                every,
                state.max_steps,
            )
        self.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Selects if that is due.

        Not in `on_epoch_end`: a checkpoint of the epoch's last step is saved before that.
        """
        every = _selection_steps(args)
        is_due = state.global_step % every == 0 if every else _ends_epoch(state)
        if is_due:
            self.select()


def _selection_steps(args: TrainingArguments) -> int:
    return args.selection_steps if isinstance(args, LowRankTrainingArguments) else 0


def _ends_epoch(state: TrainerState) -> bool:
    """Whether this step is the last of an epoch, or of the training."""
    epoch = state.epoch or 0.0
    return abs(epoch - round(epoch)) < 1e-9 or state.global_step >= state.max_steps

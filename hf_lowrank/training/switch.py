"""When full-rank training gives way to low rank: Cuttlefish's switch (docs/methods.md, section 6).

Wang et al., MLSys 2023 (arXiv 2305.02538): once the stable ranks `r_l = ||W_l||_F^2 / ||W_l||_2^2`
of all layers have stopped changing, `|dr_l / dt| <= epsilon` with t in epochs and epsilon 0.1.
Simplified: one difference of two profiles for the derivative. Their code rounds r_l down, smooths
it over 15 epochs, averages the slopes of the last 11, asks less of the last two layers, and lets a
layer that has settled once stay so; a fine-tuning is over before such a window is full. Profiles
from the learning rate's warm-up do not count: weights that hardly move would look settled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EPSILON = 0.1  # of the paper: stable rank per epoch


@dataclass(frozen=True)
class StableRanks:
    """Stable ranks by layer name, after so many optimizer steps and epochs."""

    step: int
    epoch: float
    by_layer: Mapping[str, float]


@dataclass(frozen=True)
class Profile:
    """The stable ranks after so many steps and epochs.

    Attributes:
        mean_stable_rank: Mean over the layers.
        largest_change: Of a layer since the profile before, per epoch; None for the first.
    """

    step: int
    epoch: float
    mean_stable_rank: float
    largest_change: float | None = None


@dataclass(frozen=True)
class Switch:
    """When full-rank training ended.

    Attributes:
        step: After so many steps.
        epoch: And epochs.
        settled: Whether the stable ranks had settled.
        seconds: What the profiles cost.
        profiles: Oldest first.
    """

    step: int
    epoch: float
    settled: bool
    seconds: float
    profiles: list[Profile]


def largest_change(earlier: StableRanks, later: StableRanks) -> float:
    """`max_l |r_l(t) - r_l(s)| / (t - s)`, stable rank per epoch."""
    largest = max(abs(rank - earlier.by_layer[name]) for name, rank in later.by_layer.items())
    return largest / (later.epoch - earlier.epoch)


def is_settled(profiles: Sequence[StableRanks], epsilon: float = EPSILON) -> bool:
    """Whether no layer changed faster than epsilon between the last two; False for fewer."""
    return len(profiles) > 1 and largest_change(*profiles[-2:]) <= epsilon


class FullRankSwitch(TrainerCallback):
    """Profiles stable ranks while a full-rank model trains, and stops the training at the switch.

    A profile is taken at the start, then `profiles_per_epoch` times an epoch, and at the stop: when
    the stable ranks have settled, or after a share of the steps whether they have or not.

    Args:
        profile: Stable ranks by layer name, of the weights as they are.
        profiles_per_epoch: At most one profile for each step is taken.
        largest_share: Share of the steps, rounded down, one at least.
        epsilon: See `is_settled`.

    Attributes:
        profiles: What was profiled, oldest first.
        seconds: Time that it took.
    """

    def __init__(
        self,
        profile: Callable[[], Mapping[str, float]],
        profiles_per_epoch: int,
        largest_share: float,
        epsilon: float = EPSILON,
    ) -> None:
        self.profile = profile
        self.profiles_per_epoch = profiles_per_epoch
        self.largest_share = largest_share
        self.epsilon = epsilon
        self.profiles: list[StableRanks] = []
        self.seconds = 0.0
        self._warmup_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the first profile."""
        self._warmup_steps = args.get_warmup_steps(state.max_steps)
        self._take(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the profile that is due, and stops the training if that is."""
        steps_per_epoch = state.max_steps / args.num_train_epochs
        interval = max(1, int(steps_per_epoch / self.profiles_per_epoch))
        is_last = state.global_step >= max(1, int(self.largest_share * state.max_steps))
        if is_last or state.global_step % interval == 0:
            self._take(state)
            control.should_training_stop |= is_last or self.has_settled()

    def has_settled(self) -> bool:
        """`is_settled` of the profiles from the end of the warm-up on."""
        counting = [found for found in self.profiles if found.step >= self._warmup_steps]
        return is_settled(counting, self.epsilon)

    def summary(self) -> Switch:
        """What happened."""
        last = self.profiles[-1]
        changes = [None, *(largest_change(*pair) for pair in pairwise(self.profiles))]
        profiles = [
            Profile(each.step, each.epoch, sum(each.by_layer.values()) / len(each.by_layer), change)
            for each, change in zip(self.profiles, changes, strict=True)
        ]
        return Switch(last.step, last.epoch, self.has_settled(), self.seconds, profiles)

    def _take(self, state: TrainerState) -> None:
        start = time.perf_counter()
        found = StableRanks(state.global_step, state.epoch or 0.0, dict(self.profile()))
        self.profiles.append(found)
        self.seconds += time.perf_counter() - start

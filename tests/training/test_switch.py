"""Cuttlefish's switch: the rule by hand, and a training that a scripted sequence stops."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from hf_lowrank.training.switch import FullRankSwitch, StableRanks, is_settled, largest_change
from tests.tiny_models import tiny_bert_classifier
from tests.training import sentence_rows

EARLIER = StableRanks(10, 1.0, {"a": 4.0, "b": 9.0})
LATER = StableRanks(15, 1.5, {"a": 4.02, "b": 8.97})


def test_the_fastest_layer_counts_per_epoch_and_in_both_directions():
    assert largest_change(EARLIER, LATER) == pytest.approx(0.03 / 0.5)
    assert largest_change(LATER, StableRanks(35, 3.5, {"a": 4.5, "b": 8.97})) == pytest.approx(0.24)


@pytest.mark.parametrize(("epsilon", "settled"), [(0.061, True), (0.059, False)])
def test_settled_is_a_change_of_at_most_epsilon(epsilon: float, settled: bool):
    assert is_settled([EARLIER, LATER], epsilon) is settled


def test_the_threshold_of_the_paper_is_included():
    start = StableRanks(0, 0.0, {"a": 0.0})
    assert is_settled([start, StableRanks(1, 1.0, {"a": 0.1})])
    assert not is_settled([start, StableRanks(1, 1.0, {"a": 0.1001})])


def test_one_profile_settles_nothing_and_only_the_last_two_count():
    assert not is_settled([])
    assert not is_settled([EARLIER])
    restless = StableRanks(5, 0.5, {"a": 100.0, "b": 100.0})
    assert is_settled([restless, EARLIER, LATER])
    assert not is_settled([EARLIER, LATER, StableRanks(20, 2.0, {"a": 4.02, "b": 9.5})])


class Script:
    """Profiles as written; the last one again and again."""

    def __init__(self, profiles: Sequence[Mapping[str, float]]) -> None:
        self.profiles = list(profiles)

    def __call__(self) -> Mapping[str, float]:
        return self.profiles.pop(0) if len(self.profiles) > 1 else self.profiles[0]


def trained(switch: FullRankSwitch, folder: Path, warmup_steps: int = 0) -> Trainer:
    """A training of four epochs of four steps, with this callback."""
    arguments = TrainingArguments(
        str(folder), num_train_epochs=4, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, warmup_steps=warmup_steps,
    )  # fmt: skip
    model, rows = tiny_bert_classifier(), sentence_rows()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[switch])
    trainer.train()
    return trainer


def moving(*ranks: float) -> Script:
    """A layer that stands still beside one that moves."""
    return Script([{"still": 3.0, "moving": rank} for rank in ranks])


@pytest.mark.parametrize(
    ("script", "share", "steps", "settled"),
    [
        (moving(5.0, 4.0, 3.9, 3.86), 0.9, [0, 2, 4, 6], True),  # 0.04 in half an epoch
        (moving(5.0, 4.97), 0.9, [0, 2], True),
        (moving(*range(9, 0, -1)), 0.5, [0, 2, 4, 6, 8], False),
        (moving(*range(9, 0, -1)), 0.45, [0, 2, 4, 6, 7], False),  # the last one out of turn
        (moving(5.0, 4.0, 4.0), 0.25, [0, 2, 4], True),  # settled at the last moment
        (moving(5.0, 1.0), 0.01, [0, 1], False),
    ],
)
def test_training_stops_at_the_switch(
    script: Script, share: float, steps: list[int], settled: bool, tmp_path: Path
):
    switch = FullRankSwitch(script, 2, share)
    trainer = trained(switch, tmp_path)
    found = switch.summary()
    assert (trainer.state.global_step, trainer.state.max_steps) == (steps[-1], 16)
    assert [profile.step for profile in found.profiles] == steps
    assert [profile.epoch for profile in found.profiles] == [step / 4 for step in steps]
    assert (found.step, found.epoch) == (steps[-1], steps[-1] / 4)
    assert found.settled is settled
    assert found.seconds >= 0


@pytest.mark.parametrize(("warmup_steps", "stop"), [(0, 2), (1, 4), (2, 4), (3, 6)])
def test_the_warm_up_does_not_count_as_settled(warmup_steps: int, stop: int, tmp_path: Path):
    switch = FullRankSwitch(moving(5.0), 2, 0.9)
    assert trained(switch, tmp_path, warmup_steps).state.global_step == stop
    assert switch.summary().settled


def test_the_summary_tells_means_and_changes(tmp_path: Path):
    switch = FullRankSwitch(moving(5.0, 4.0, 3.9, 3.86), 2, 0.9)
    trained(switch, tmp_path)
    profiles = switch.summary().profiles
    means = [profile.mean_stable_rank for profile in profiles]
    assert means == pytest.approx([4.0, 3.5, 3.45, 3.43])
    assert profiles[0].largest_change is None
    changes = [profile.largest_change for profile in profiles[1:]]
    assert changes == pytest.approx([2.0, 0.2, 0.08])


def test_more_profiles_than_steps_are_one_a_step(tmp_path: Path):
    switch = FullRankSwitch(moving(*range(9, 0, -1)), 100, 0.25)
    trained(switch, tmp_path)
    assert [profile.step for profile in switch.profiles] == [0, 1, 2, 3, 4]

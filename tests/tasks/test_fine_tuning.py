"""How long the parts of a training on a task are."""

import pytest

from hf_lowrank.tasks import fine_tuning
from hf_lowrank.tasks.glue import GlueArguments


def test_a_part_of_the_training_has_its_share_of_the_steps_or_epochs():
    args = GlueArguments(epochs=3, steps=0)
    assert fine_tuning.training_length(args, 0.5) == {"num_train_epochs": 1.5}
    args.steps = 1201
    assert fine_tuning.training_length(args) == {"max_steps": 1201}
    assert fine_tuning.training_length(args, 0.3) == {"max_steps": 360}
    args.steps = 1  # none would leave Trainer its three epochs
    assert fine_tuning.training_length(args, 0.3) == {"max_steps": 1}


@pytest.mark.parametrize("steps", [2, 3, 5, 1200])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_two_parts_of_a_training_have_its_steps_together(steps: int, share: float):
    args = GlueArguments(steps=steps)
    first, second = (each["max_steps"] for each in fine_tuning.split_length(args, share))
    assert first + second == steps
    assert min(first, second) >= 1
    assert abs(first - share * steps) <= 1 or min(first, second) == 1

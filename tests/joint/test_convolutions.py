"""A vision model: its convolutions as linear layers, compressed jointly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank import LowRankConfig
from hf_lowrank.convolutions import LinearConv2d, linearize_convolutions_
from hf_lowrank.errors import TargetError
from hf_lowrank.joint.system import compress_jointly
from hf_lowrank.losses import ItemLosses
from tests.tiny_models import num_lowrank


class Vision(nn.Module):
    """Two convolutions, one of them 1x1, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 32, 1, bias=False)
        self.third = nn.Conv2d(32, 24, (3, 2), dilation=(1, 2), padding=(0, 1))
        self.hidden = nn.Linear(24, 16)
        self.classify = nn.Linear(16, 5)

    def forward(self, images):
        maps = self.third(self.second(self.first(images).tanh()).tanh()).tanh()
        return self.classify(self.hidden(maps.mean(dim=(2, 3))).tanh())


def vision_loss(model, batch):
    logits = model(batch["images"])
    losses = F.cross_entropy(logits, batch["labels"], reduction="none")
    return ItemLosses(losses, torch.ones_like(batch["labels"]))


def vision_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Vision().eval()


def vision_batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "images": torch.randn(8, 3, 8, 8, generator=generator),
            "labels": torch.randint(0, 5, (8,), generator=generator),
        }
        for _ in range(count)
    ]


def test_a_vision_model_of_linear_layers_and_convolutions():
    model, batches = vision_model(), vision_batches(6)
    names = linearize_convolutions_(model)
    assert names == ["first.linear", "second.linear", "third.linear"]
    config = LowRankConfig(param_ratio=0.6, target_modules=[*names, "hidden"])
    result = compress_jointly(
        model,
        config,
        batches[:3],
        batches[3:5],
        batches[5:],
        loss_function=vision_loss,
        progress=False,
    )
    assert result.report.held_out["mean"] <= result.baseline.mean
    assert result.report.parameters["targeted_kept"] < result.report.parameters["targeted_dense"]
    assert num_lowrank(model) > 0


def test_a_linearized_convolution_computes_the_same():
    model, batch = vision_model(), vision_batches(1)[0]
    before = model(batch["images"])
    linearize_convolutions_(model)
    assert isinstance(model.third, LinearConv2d)
    assert torch.allclose(model(batch["images"]), before, atol=1e-5)


def test_convolutions_that_cannot_be_linearized_are_left_alone():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same"))
    with pytest.raises(TargetError, match="no convolution that can become linear"):
        linearize_convolutions_(model)

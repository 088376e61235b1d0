"""A net with a summed loss for the moments, models' layers, and comparisons of moments."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import ItemLosses

ALL = frozenset({"input", "input_centred", "output", "input_abs", "gradient_rows", "gradient"})
SECOND = frozenset({"input", "input_centred", "output"})
SIZES = (6, 4, 5, 5)
LENGTHS = (7, 3, 5, 6)


class Net(nn.Module):
    """Three layers, wide, tall and square, with biases; positions do not see each other."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        rng = np.random.default_rng(0)
        self.layers = nn.ModuleDict()
        for name, columns, rows in zip(("wide", "tall", "square"), SIZES, SIZES[1:], strict=False):
            weight, bias = rng.normal(size=(rows, columns)), rng.normal(size=rows)
            self.layers[name] = made = (
                nn.Linear(columns, rows) if layer is nn.Linear else Conv1D(rows, columns)
            )
            stored = weight if layer is nn.Linear else weight.T
            with torch.no_grad():
                made.weight.copy_(torch.from_numpy(stored))
                made.bias.copy_(torch.from_numpy(bias))
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs, attention_mask=None):
        hidden = self.layers["wide"](inputs).tanh()
        hidden = self.layers["tall"](self.dropout(hidden)).tanh()
        return self.layers["square"](hidden)

    @property
    def targets(self):
        return dict(self.layers.items())


def net_loss(model, batch):
    """Cross-entropy summed over the unmasked positions of each sequence."""
    logits = model(batch["inputs"], batch.get("attention_mask"))
    found = F.cross_entropy(logits.mT, batch["labels"], reduction="none")
    mask = batch.get("attention_mask", torch.ones_like(batch["labels"]))
    return ItemLosses((found * mask).sum(1), mask.sum(1))


def net_batch(padded=True):
    """Four sequences; what stands in the padding is large, so that it shows wherever it leaks."""
    rng = np.random.default_rng(1)
    inputs = torch.from_numpy(rng.normal(size=(4, 7, 6)).astype("float32"))
    labels = torch.from_numpy(rng.integers(0, 5, size=(4, 7)))
    batch = {"inputs": inputs, "labels": labels}
    if padded:
        batch["attention_mask"] = torch.zeros(4, 7, dtype=torch.long)
        for row, length in enumerate(LENGTHS):
            batch["attention_mask"][row, :length] = 1
            inputs[row, length:] = 100.0
    return batch


def collect_net(net, batches, needs=ALL, **options):
    return collect_moments(net, net.targets, batches, needs, loss_function=net_loss, **options)


def split(batch, size):
    return [
        {name: value[start : start + size] for name, value in batch.items()}
        for start in range(0, len(batch["labels"]), size)
    ]


def assert_equal_moments(found, wanted):
    assert found.keys() == wanted.keys()
    for name, first in found.items():
        second = wanted[name]
        assert (first.tokens, first.losses) == (second.tokens, second.losses)
        for field in sorted(SECOND):
            one, other = getattr(first, field), getattr(second, field)
            assert one.squares == pytest.approx(other.squares, rel=1e-4)
            tolerance = 1e-5 * float(other.matrix.abs().max())
            assert torch.allclose(one.matrix, other.matrix, rtol=1e-4, atol=tolerance), name
        for field in ("input_abs", "gradient_rows", "gradient"):
            one, other = getattr(first, field), getattr(second, field)
            tolerance = 1e-5 * float(other.abs().max())
            assert torch.allclose(one, other, rtol=1e-4, atol=tolerance), (name, field)


def linears(model):
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
        and name not in ("bert.pooler.dense", "classifier")
    }  # fmt: skip


def assert_close(found, wanted):
    scale = float(wanted.abs().max())
    assert scale > 1e-6
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * scale)

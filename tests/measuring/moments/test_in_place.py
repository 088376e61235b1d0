"""Models that write into tensors which a layer has read or written."""

import torch
from torch import nn

from tests.measuring.moments import ALL, Net, assert_equal_moments, collect_net, net_batch


class Writer(Net):
    """Scales the first layer's output, in place or not; as Longformer does with its queries."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, inputs, attention_mask=None):
        hidden = self.layers["wide"](inputs)
        hidden = hidden.mul_(0.5) if self.in_place else hidden * 0.5
        hidden = self.layers["tall"](hidden.tanh())
        return self.layers["square"](hidden.div_(3) if self.in_place else hidden / 3)


def test_writing_into_an_output_changes_no_moment():
    wanted = collect_net(Writer(in_place=False), [net_batch()])
    assert_equal_moments(collect_net(Writer(in_place=True), [net_batch()]), wanted)


class Twins(nn.Module):
    """Two layers that read one tensor, which is written into in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({"one": nn.Linear(6, 5), "two": nn.Linear(6, 5)})

    def forward(self, inputs, attention_mask=None):
        shared = inputs.clone()
        first = self.layers["one"](shared)
        return first + self.layers["two"](shared.mul_(2))

    @property
    def targets(self):
        return dict(self.layers.items())


def test_a_tensor_that_was_written_into_is_another_input():
    found = collect_net(Twins(), [net_batch(padded=False)], ALL - {"input_centred"})
    one, two = (found[name].input.matrix for name in ("one", "two"))
    # wider than tall: the moments are those of the images, whose weights differ
    inputs = net_batch(padded=False)["inputs"].reshape(-1, 6)
    for layer, moment, scale in zip(Twins().targets.values(), (one, two), (1, 2), strict=True):
        image = scale * inputs @ layer.weight.detach().T
        torch.testing.assert_close(moment, image.T @ image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["two"].input_abs, 2 * found["one"].input_abs)

"""Convolutions as linear layers on patches, so that everything made for `nn.Linear` applies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.errors import TargetError
from hf_lowrank.surgery import replace_layer_


class LinearConv2d(nn.Module):
    """A 2-D convolution as `nn.Linear` on unfolded patches.

    Args:
        convolution: The convolution to take over; one group, numbers or pairs as padding, zeros
            around the image.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.kernel_size = convolution.kernel_size
        self.dilation = convolution.dilation
        self.padding = tuple(int(size) for size in convolution.padding)
        self.stride = convolution.stride
        weight = convolution.weight.detach().flatten(1)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], convolution.bias is not None)
        self.linear.to(weight)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            if convolution.bias is not None:
                self.linear.bias.copy_(convolution.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The convolution of images (batch, in, height, width)."""
        patches = F.unfold(images, self.kernel_size, self.dilation, self.padding, self.stride)
        outputs: torch.Tensor = self.linear(patches.mT).mT
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                images.shape[-2:],
                self.padding,
                self.dilation,
                self.kernel_size,
                self.stride,
                strict=True,
            )
        )
        return outputs.reshape(*outputs.shape[:-1], height, width)


def is_linearizable(module: nn.Module) -> bool:
    """Whether a module is a convolution that `LinearConv2d` can take over."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def linearize_convolutions_(model: nn.Module) -> list[str]:
    """Replaces a model's 2-D convolutions by `LinearConv2d`, in place; its outputs stay.

    Grouped convolutions, padding by name and other padding modes are left alone.

    Returns:
        Names of the linear layers inside, for `target_modules`.

    Raises:
        TargetError: There is no convolution that can be replaced.
    """
    found = [(n, m) for n, m in model.named_modules() if n and is_linearizable(m)]
    if not found:
        raise TargetError(f"{type(model).__name__} has no convolution that can become linear.")
    for name, module in found:
        assert isinstance(module, nn.Conv2d)  # is_linearizable
        replace_layer_(model, name, LinearConv2d(module).train(module.training))
    return [f"{name}.linear" for name, _ in found]

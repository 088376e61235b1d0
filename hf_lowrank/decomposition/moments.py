"""What calibration leaves behind for one layer.

A decomposition needs an s x s matrix of either side only, with s = min(m, n) (spectrum.py). So the
larger side's vectors are mapped to the smaller side by the weight before their products are
summed: for a tall weight `W^T g` takes the place of `g`, for a wide one `W x` that of `x`. A
feed-forward layer of 1536 x 576 then needs two 576 x 576 sums in place of one of 1536 x 1536.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class SecondMoment:
    """Sum of outer products of one side's vectors over tokens.

    Attributes:
        matrix: `sum z z^T`, shape (s, s), fp32; z is the vector itself, or its image under the
            weight if the vector is on the larger side.
        squares: Sum of squares of the vectors themselves (not of their images).
        size: Length of the vectors themselves.
    """

    matrix: torch.Tensor
    squares: float
    size: int

    @property
    def is_projected(self) -> bool:
        """Whether the matrix is that of the images."""
        return self.matrix.shape[0] < self.size

    @property
    def mean_diagonal(self) -> float:
        """Mean diagonal of the moment of the vectors themselves."""
        return self.squares / self.size


@dataclass
class Moments:
    """Statistics of one layer, summed over the calibration tokens; None where not asked for.

    Attributes:
        input: Moment of the inputs x; one object is shared by layers that read the same tensor.
        input_whole: Moment of the inputs x themselves, never of their images, for what needs more
            than a decomposition: channels of the larger side, layers that share a basis.
        input_centred: Moment of the inputs less their mean over each sequence.
        output: Moment of g, the gradient of the summed loss by the layer's output.
        input_abs: Sum of |x|, shape (n,), fp32.
        gradient_rows: Row sums of the squared weight gradient, each sequence's gradient squared
            on its own, shape (m,), fp32.
        gradient: Weight gradient of the summed loss, shape (m, n), fp32.
        tokens: Unmasked tokens that passed through the layer.
        losses: Terms in the loss: scored tokens, or sentences.
        strength: Sum of `|x|^2 |g|^2` over tokens, where x and g are weighted evenly (`evenly`).
    """

    input: SecondMoment | None = None
    input_whole: SecondMoment | None = None
    input_centred: SecondMoment | None = None
    output: SecondMoment | None = None
    input_abs: torch.Tensor | None = None
    gradient_rows: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    tokens: int = 0
    losses: int = 0
    strength: float | None = None


def evenly(
    inputs: torch.Tensor, gradients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A token's input and gradient, scaled so that both are of length `sqrt(|x| |g|)`.

    The outer product `g x^T` stays what it is, and with it the Fisher information, whose Kronecker
    factors are to be estimated. They are taken to be independent, which they are not where one
    is tiny and the other huge: the first position of many models, layers with a norm behind them.
    Weighted by what it contributes, such a token counts in both factors for no more than that.

    Args:
        inputs: x, shape (tokens, n).
        gradients: g, shape (tokens, m).

    Returns:
        Both scaled, fp32, and the sum of `|x|^2 |g|^2`.
    """
    inputs, gradients = inputs.float(), gradients.float()
    sizes = [rows.norm(dim=1, keepdim=True) for rows in (inputs, gradients)]
    root = (sizes[0] * sizes[1]).sqrt()
    scales = [torch.where(root > 0, root / size, 0.0) for size in sizes]
    return inputs * scales[0], gradients * scales[1], float(root.double().pow(4).sum())

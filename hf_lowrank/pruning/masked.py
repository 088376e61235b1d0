"""`MaskedWeights`: weights under a mask, with a straight-through gradient and no wrapper.

Between optimizer steps a parameter holds `W * mask`, so forward and backward passes, evaluation
and checkpoints see the pruned weight and nothing else. For the optimizer step it holds the dense
`W`, to which the gradient by the masked weight is applied as it is: straight through. The
parameter changes hands by pointer, so a step costs one multiply-add for the scores and one
product with the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hf_lowrank.errors import CheckpointError, TargetError
from hf_lowrank.pruning.scores import add_movement_, choose_masks


class MaskedWeights:
    """Dense weights, masks and scores of the pruned parameters.

    Args:
        parameters: The weights by layer name, on the device that they train on.
        criterion: "movement" or "magnitude".
        scope: "layer" or "global".

    Attributes:
        dense: The weights without mask.
        masks: Which weights survive.
        scores: Movement scores, fp32; empty for magnitude.
        step: Optimizer steps seen.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], criterion: str, scope: str) -> None:
        self.parameters = dict(parameters)
        self.scope = scope
        self.dense = {name: p.detach().clone() for name, p in parameters.items()}
        self.masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.dense.items()}
        self.scores: dict[str, torch.Tensor] = {}
        if criterion == "movement":
            self.scores = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in
                           self.dense.items()}  # fmt: skip
        self.step = 0
        self._masked: dict[str, torch.Tensor] = {}

    @property
    def density(self) -> float:
        """Share of the weights that the masks keep now."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return kept / sum(mask.numel() for mask in self.masks.values())

    @property
    def num_bytes(self) -> int:
        """Memory that pruning adds to the training."""
        return sum(
            tensor.numel() * tensor.element_size()
            for group in (self.dense, self.masks, self.scores)
            for tensor in group.values()
        )

    @torch.no_grad()
    def before_step(self) -> None:
        """Adds the gradients to the scores and gives the optimizer the dense weights.

        Raises:
            TargetError: A weight is to be scored and has no gradient.
        """
        for name, scores in self.scores.items():
            gradient = self.parameters[name].grad
            if gradient is None:
                raise TargetError(
                    f"{name}: its weight gets no gradient, so it has no movement; unfreeze it, "
                    "exclude the layer, or prune by magnitude."
                )
            add_movement_(scores, gradient, self.dense[name])
        for name, parameter in self.parameters.items():
            self._masked[name] = parameter.data
            parameter.data = self.dense[name]

    @torch.no_grad()
    def after_step(self, density: float | None = None) -> None:
        """Puts the masked weights back, chosen anew if a density is given.

        Raises:
            NumericalError: A score is NaN or infinite.
        """
        self.step += 1
        if density is not None:
            scores = self.scores or {name: w.float().abs() for name, w in self.dense.items()}
            self.masks = choose_masks(scores, density, self.scope)
        for name, parameter in self.parameters.items():
            self.dense[name] = parameter.data
            masked = self._masked.pop(name)
            torch.mul(self.dense[name], self.masks[name], out=masked)
            parameter.data = masked

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs, as tensors by name."""
        groups = {"dense": self.dense, "mask": self.masks, "scores": self.scores}
        tensors = {
            f"{name}/{part}": tensor
            for part, group in groups.items()
            for name, tensor in group.items()
        }
        return tensors | {"step": torch.tensor(self.step)}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes up a state; the parameters hold the masked weights afterwards.

        Raises:
            CheckpointError: The state is that of other layers or another criterion.
        """
        own = self.state()
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in own.items()}:
            odd = sorted(set(tensors) ^ set(own)) or ["other shapes"]
            raise CheckpointError(
                f"The pruning state does not fit the model or its settings: {odd[0]}; resume with "
                "the settings of the first run."
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.step = int(tensors["step"])
        for name, parameter in self.parameters.items():
            torch.mul(self.dense[name], self.masks[name], out=parameter.data)

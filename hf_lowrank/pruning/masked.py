"""`MaskedWeights`: weights under a mask, with a straight-through gradient and no wrapper.

Between optimizer steps a parameter holds `W * mask`, so forward and backward passes, evaluation
and checkpoints see the pruned weight and nothing else. For the optimizer step it holds the dense
`W`, to which the gradient by the masked weight is applied as it is: straight through. The
parameter changes hands by pointer, so a step costs the scores and one product with the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hf_lowrank.errors import CheckpointError, TargetError
from hf_lowrank.pruning.scores import CRITERIA, choose_masks


class MaskedWeights:
    """Dense weights, masks and scores of the pruned parameters.

    Args:
        parameters: The weights by layer name, on the device that they train on.
        criterion: A name in `CRITERIA`.

    Attributes:
        dense: The weights without mask.
        masks: Which weights survive.
        criterion: What tells which are to survive.
        density: Share of the weights that the masks keep now.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], criterion: str) -> None:
        self.parameters = dict(parameters)
        self.dense = {name: p.detach().clone() for name, p in parameters.items()}
        self.masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.dense.items()}
        self.criterion = CRITERIA[criterion](self.dense)
        self.density = 1.0
        self._masked: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that masks and scores add to the training, an optimizer's state not counted."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    @torch.no_grad()
    def before_step_(self) -> None:
        """Shows the gradients to the criterion and gives the optimizer the dense weights.

        Raises:
            TargetError: A weight is to be scored and has no gradient.
        """
        for name, parameter in self.parameters.items():
            if self.criterion.reads_gradients:
                if parameter.grad is None:
                    raise TargetError(
                        f"{name}: its weight gets no gradient to score it by; unfreeze it, exclude "
                        "the layer, or prune by magnitude."
                    )
                self.criterion.add(name, self.dense[name], parameter.grad, self.density)
            self._masked[name] = parameter.data
            parameter.data = self.dense[name]

    @torch.no_grad()
    def after_step_(self, density: float | None = None) -> None:
        """Puts the masked weights back, chosen anew if a density is given.

        Raises:
            NumericalError: A score is NaN or infinite.
        """
        self.dense = {name: parameter.data for name, parameter in self.parameters.items()}
        if density is not None:
            self.masks = choose_masks(self.criterion.scores(self.dense), density)
            self._count()
            if self.criterion.restarts:
                for name, mask in self.masks.items():
                    self.dense[name] *= mask
        for name, parameter in self.parameters.items():
            masked = self._masked.pop(name)
            torch.mul(self.dense[name], self.masks[name], out=masked)
            parameter.data = masked

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs, as tensors by name."""
        groups = {"dense": self.dense, "mask": self.masks, **self.criterion.state}
        return {
            f"{name}/{part}": tensor.detach()
            for part, group in groups.items()
            for name, tensor in group.items()
        }

    @torch.no_grad()
    def load_state_(self, tensors: Mapping[str, torch.Tensor]) -> None:
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
        self._count()
        for name, parameter in self.parameters.items():
            torch.mul(self.dense[name], self.masks[name], out=parameter.data)

    def _count(self) -> None:
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        self.density = kept / sum(mask.numel() for mask in self.masks.values())

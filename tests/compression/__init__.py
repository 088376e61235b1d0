"""What the tests of whole compression runs ask of a model and its loss."""

import torch
import torch.nn.functional as F

from hf_lowrank.measuring.losses import item_losses
from tests.tiny_models import logits, num_lowrank, tiny_llama

NAN_LAYER = "model.layers.0.mlp.up_proj"


def is_dense(model):
    return num_lowrank(model) == 0


def num_hooks(model):
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def mean_loss(model, batches):
    """Independent of the package: next-token loss, nats per token."""
    total, count = 0.0, 0
    for batch in batches:
        found = logits(model, batch)[:, :-1].double()
        total += float(F.cross_entropy(found.mT, batch["input_ids"][:, 1:], reduction="sum"))
        count += batch["input_ids"][:, 1:].numel()
    return total / count


# The first batch runs once more, to show which layers can be factorized.
DRY = 1


class CountingLoss:
    """The usual loss; counts its calls, and fails at one of them."""

    def __init__(self, fail_at=None):
        self.calls = 0
        self.fail_at = fail_at

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("stopped on purpose")
        return item_losses(model, batch)


def model_with_nan():
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(NAN_LAYER).weight[3, 5] = float("nan")
    return model

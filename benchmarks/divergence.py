"""How far a language model's predictions are from another's: KL by token, and both losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.evaluation.perplexity import LossMeasurement
from hf_lowrank.measuring.items import IGNORED, Batch, eval_mode, without_labels
from hf_lowrank.measuring.progress import track


@dataclass(frozen=True)
class Divergence:
    """Two models on one text.

    Attributes:
        before: Losses of the first.
        after: Losses of the second.
        kl: KL(first || second) of each scored token, nats, fp32.
    """

    before: LossMeasurement
    after: LossMeasurement
    kl: torch.Tensor


@torch.no_grad()
def measure_divergence(
    dense: nn.Module, model: nn.Module, batches: Sequence[Batch], progress: str | None = None
) -> Divergence:
    """Runs both models side by side, so that no logits are kept.

    Args:
        dense: The model to compare with, causal, on the CPU as the other one.
        model: The other model.
        batches: Windows of tokens without padding, from `token_batches`.
        progress: Name of the phase, or None to show nothing.
    """
    sums: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])
    divergences = []
    with eval_mode(dense), eval_mode(model):
        for batch in track(batches, progress):
            found = [
                each(**without_labels(batch), use_cache=False).logits for each in (dense, model)
            ]
            targets = batch.get("labels", batch["input_ids"])[:, 1:]
            for item, labels in enumerate(targets):
                scored = labels != IGNORED
                first, second = (
                    logits[item, :-1][scored].float().log_softmax(dim=-1) for logits in found
                )
                for items, logs in zip(sums, (first, second), strict=True):
                    loss = F.nll_loss(logs, labels[scored], reduction="sum")
                    items.append((float(loss), int(scored.sum())))
                divergences.append(
                    F.kl_div(second, first, log_target=True, reduction="none").sum(-1)
                )
    before, after = (LossMeasurement(tuple(items)) for items in sums)
    return Divergence(before, after, torch.cat(divergences))


def summary(kl: torch.Tensor) -> dict[str, float]:
    """Mean, median and 99th percentile over tokens."""
    values = kl.double()
    return {
        "mean": float(values.mean()),
        "median": float(values.quantile(0.5)),
        "p99": float(values.quantile(0.99)),
    }

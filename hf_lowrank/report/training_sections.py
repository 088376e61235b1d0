"""The sections of a report about ranks that were selected while a model trained."""

from __future__ import annotations

from dataclasses import dataclass

from hf_lowrank.ranks.tolerance import Probe


@dataclass(frozen=True)
class RankSelection:
    """What one selection of ranks did while a model trained.

    Attributes:
        step: Optimizer steps before it.
        epoch: Epochs before it.
        probes: Steps of its bisection.
        ranks: By layer name after it; None where a layer is dense.
        param_ratio: Kept share of the targeted parameters after it.
        loss_before: Mean loss before it, None where a size was due.
        loss_passes: Passes over the selection batches.
        decompositions: Number of spectra computed.
        seconds: Wall time.
    """

    step: int
    epoch: float | None
    probes: list[Probe]
    ranks: dict[str, int | None]
    param_ratio: float
    loss_before: float | None
    loss_passes: int
    decompositions: int
    seconds: float


@dataclass(frozen=True)
class Training:
    """How low-rank training from full rank went.

    Attributes:
        epochs: Passes over the training set.
        learning_rate: Peak rate.
        rule: How ranks were selected.
        selections: How often.
        param_ratio: Their goal as a kept share of the targeted parameters, or None.
        tolerance: Their goal as a rise of the loss in nats, each.
    """

    epochs: float
    learning_rate: float
    rule: str
    selections: int
    param_ratio: float | None
    tolerance: float | None

"""What each stage of LPAF recorded, and the report of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_lowrank.pruning.pruned_ranks import NumericalRanks
from hf_lowrank.ranks.tolerance import LossDifference


@dataclass(frozen=True)
class PruningOverhead:
    """What pruning cost in this process.

    Attributes:
        bytes: Memory that it held.
        seconds: Time that it took.
    """

    bytes: int
    seconds: float


@dataclass(frozen=True)
class MixingOverhead:
    """What mixed ranks cost.

    Attributes:
        sparse_bytes: Memory of the sparse matrices.
        mixed_step_seconds: Mean time of a step with them; None where there was none.
        plain_step_seconds: The same of a step without.
    """

    sparse_bytes: int
    mixed_step_seconds: float | None
    plain_step_seconds: float | None


@dataclass(frozen=True)
class Pruned:
    """The first stage.

    Attributes:
        seconds: Wall time.
        numerical_ranks: Of the weights before the cut.
        overhead: None where nothing was pruned.
    """

    STAGE: ClassVar[str] = "pruned"

    seconds: float
    numerical_ranks: NumericalRanks
    overhead: PruningOverhead | None


@dataclass(frozen=True)
class Cut:
    """What `compress` reported of the second stage.

    Attributes:
        compression_seconds: Wall time of its phases.
        predicted_loss_difference: As in `Report`.
        failures: Layers that stay dense since their decomposition failed, with the reason.
        held_out: Measured rise of the loss, where a tolerance was asked for.
    """

    compression_seconds: dict[str, float]
    predicted_loss_difference: float | None
    failures: dict[str, str]
    held_out: LossDifference | None


@dataclass(frozen=True)
class Factorized(Cut):
    """The second stage.

    Attributes:
        seconds: Wall time.
        ranks: By layer name; None where it stays dense.
    """

    STAGE: ClassVar[str] = "factorized"

    seconds: float
    ranks: dict[str, int | None]


@dataclass(frozen=True)
class FineTuned:
    """The last stage.

    Attributes:
        seconds: Wall time.
        overhead: None where nothing was trained.
        held_out_loss: Mean loss of the best epoch on the examples that chose it, if there were any.
    """

    STAGE: ClassVar[str] = "fine_tuned"

    seconds: float
    overhead: MixingOverhead | None
    held_out_loss: float | None


@dataclass(frozen=True)
class Overheads:
    """What the first and the last stage cost; see there."""

    pruning: PruningOverhead | None
    fine_tuning: MixingOverhead | None = None


@dataclass(frozen=True)
class TargetSizes:
    """Parameters of the targeted layers' weights, before and after."""

    targeted_dense: int
    targeted_kept: int


@dataclass(frozen=True)
class LpafReport:
    """What the stages did. Of a model that was left pruned and dense the last four are None.

    Attributes:
        settings: All of `LpafSettings`.
        density: Share of the targeted weights that survive.
        numerical_ranks: Of the weights before the cut.
        overheads: By stage.
        seconds: Wall time by stage.
        restored: Stages that an earlier run had finished.
        ranks: By layer name; None where it stays dense.
        parameters: Sizes of the targeted layers.
        compression: What `compress` reported.
        held_out_loss: See `FineTuned`.
    """

    settings: dict[str, Any]
    density: float
    numerical_ranks: NumericalRanks
    overheads: Overheads
    seconds: dict[str, float]
    restored: list[str] = field(default_factory=list)
    ranks: dict[str, int | None] | None = None
    parameters: TargetSizes | None = None
    compression: Cut | None = None
    held_out_loss: float | None = None

"""Tiny pruning and mixed-rank runs."""

from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.pruning.mixed_trainer import MixedRankTrainer
from hf_lowrank.pruning.pruning_arguments import MixedRankArguments, PruningArguments
from hf_lowrank.pruning.pruning_trainer import PruningTrainer
from tests.training import Rows, settings


def pruning_trainer(model: nn.Module, rows: Rows, folder: Path, **changes: Any) -> PruningTrainer:
    changes = {"mask_interval": 1, **changes}
    callbacks = changes.pop("callbacks", None)
    args = PruningArguments(**settings(folder, **changes))
    return PruningTrainer(model, args, train_dataset=rows, callbacks=callbacks)


def factorized(model: nn.Module, rank: int = 6) -> dict[str, nn.Module]:
    """Cuts a model in place; returns its dense layers as the sparse ones."""
    layers = find_targets(model, LowRankConfig())
    compress(model, LowRankConfig(rank=rank, metric="plain"), progress=False)
    return layers


def mixed_trainer(
    model: nn.Module, sparse: dict[str, nn.Module], rows: Rows, folder: Path, **changes: Any
) -> MixedRankTrainer:
    extra = {n: changes.pop(n) for n in ("callbacks", "teacher") if n in changes}
    args = MixedRankArguments(**settings(folder, **changes))
    return MixedRankTrainer(model, args, sparse_layers=sparse, train_dataset=rows, **extra)

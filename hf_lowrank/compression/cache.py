"""A folder of finished moments and spectra, so that a killed or repeated run goes on from there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowrank.channels.expert_order import ExpertOrder
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.compression.prices import HeldOutPrices
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.decomposition.spectrum import Factors, Spectrum
from hf_lowrank.errors import StorageError
from hf_lowrank.files import atomic_file
from hf_lowrank.format.feed_forward import FeedForward
from hf_lowrank.inputs.digest import update_digest
from hf_lowrank.measuring.effects import Effects
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.measuring.progress import announce

_VERSION = 2  # of what the results mean
# Which settings each kind of result depends on, beside the model and the calibration data.
_MOMENTS = ("label_source", "seed")
_SPECTRA = (*_MOMENTS, "metric", "input_damping", "output_damping", "activation_alpha")
_SETTINGS = {"moments": _MOMENTS, "spectra": _SPECTRA, "channels": _SPECTRA, "experts": _SPECTRA}
# Plain data: what a file may hold beside tensors, numbers and text; all else is refused on reading.
torch.serialization.add_safe_globals(
    [
        ChannelOrder,
        Effects,
        HeldOutPrices,
        ExpertOrder,
        Factors,
        FeedForward,
        Moments,
        SecondMoment,
        Spectrum,
    ]
)


class RunCache:
    """Results of one model on one calibration set, a file for each group of layers.

    A file's name is a hash of the model's weights, the calibration tensors and the settings that
    matter, so a stale entry is never read.

    Args:
        folder: Where all caches live; created when something is written.
        model: The dense model.
        calibration: Calibration batches.
        config: Settings of the run.
        loss_function: Loss of the run, if it is not the model's own; known by its name, so give
            another loss another name.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        calibration: Sequence[Batch],
        config: LowRankConfig,
        loss_function: LossFunction | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        digest = hashlib.blake2b(digest_size=16)
        digest.update(description(model).encode())
        named: Any = (
            loss_function if hasattr(loss_function, "__qualname__") else type(loss_function)
        )
        digest.update(f"{named.__module__}.{named.__qualname__}".encode())
        if dataclasses.is_dataclass(loss_function):
            digest.update(repr(loss_function).encode())
        for name, tensor in model.state_dict().items():
            update_digest(digest, name, tensor)
        add_batches(digest, calibration)
        self.inputs_digest = digest.hexdigest()

    def read(self, kind: str, parts: Iterable[str]) -> Any:  # noqa: ANN401
        """What was written, on the CPU; None where it is not there, or can't be read.

        Args:
            kind: "moments", "spectra", "channels" or "experts".
            parts: Names of the layers and of whatever else tells one entry from another.
        """
        return read_stored(self._path(kind, parts))

    def write(self, kind: str, parts: Iterable[str], value: object) -> None:
        """Stores a result under a temporary name and renames, so that no half of it is ever read.

        What several layers share is stored once, and is shared again when it is read.

        Raises:
            StorageError: That is not possible.
        """
        write_stored(self._path(kind, parts), value)

    def _path(self, kind: str, parts: Iterable[str]) -> Path:
        values = {name: getattr(self.config, name) for name in _SETTINGS[kind]}
        key = json.dumps([kind, _VERSION, self.inputs_digest, values, [*parts]], sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / f"{kind}-{digest}.pt"


def read_stored(path: Path, *, mapped: bool = False) -> Any:  # noqa: ANN401
    """What `write_stored` wrote, on the CPU; None where it is not there, or damaged, which is said.

    Args:
        path: The file.
        mapped: Whether tensors are read only as far as they are used.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        return None
    except Exception:  # damaged in whatever way
        announce(f"{path} can't be read; what it held is computed again")
        return None


def write_stored(path: Path, value: object) -> None:
    """Stores plain data and tensors under a temporary name and renames.

    Raises:
        StorageError: That is not possible.
    """
    try:
        with atomic_file(path) as temporary:
            torch.save(value, temporary)
    except (OSError, RuntimeError) as error:  # the latter is torch's for a full disk
        raise StorageError(f"Could not write to the cache folder {path.parent}: {error}") from error


def description(model: nn.Module) -> str:
    """What a model computes beside its weights: its modules and its config."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {k: v for k, v in settings.items() if not k.startswith("_")}
    return json.dumps([repr(model), settings], sort_keys=True, default=str)


def add_batches(digest: hashlib.blake2b, batches: Iterable[Batch]) -> None:
    """Adds batches to a hash."""
    for batch in batches:
        for name in sorted(batch):
            update_digest(digest, name, batch[name])

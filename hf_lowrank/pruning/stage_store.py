"""Finished stages of a run in a work folder, each under a hash of all that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import CheckpointError
from hf_lowrank.files import atomic_folder
from hf_lowrank.inputs.digest import update_digest
from hf_lowrank.modeling.marks import attach_config_
from hf_lowrank.modeling.surgery import empty_lowrank, replace_layer_

_WEIGHTS, _RECORD = "model.safetensors", "record.json"


class StageStore:
    """Weights and records of finished stages.

    Args:
        folder: Work folder, or None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None if it is not there."""
        if self.folder is None:
            return None
        try:
            text = (self._path(stage, key) / _RECORD).read_text("utf-8")
        except OSError:
            return None
        record: dict[str, Any] = json.loads(text)
        return record

    def load_(self, stage: str, key: str, model: nn.Module) -> None:
        """Gives a model of the stage's structure the stage's weights, in place.

        Raises:
            CheckpointError: The file is damaged or that of another model.
        """
        path = self._path(stage, key) / _WEIGHTS
        try:
            load_model(model, path)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: can't be loaded ({error}); delete the folder."
            ) from error

    def write(self, stage: str, key: str, model: nn.Module, record: Mapping[str, Any]) -> None:
        """Stores a finished stage, all or nothing.

        Raises:
            StorageError: Writing failed.
        """
        if self.folder is None:
            return
        with atomic_folder(self._path(stage, key), overwrite=True) as temporary:
            save_model(model, str(temporary / _WEIGHTS))
            (temporary / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _path(self, stage: str, key: str) -> Path:
        return Path(self.folder or ".") / f"{stage}-{key}"


def factorize_empty_(model: nn.Module, config: LowRankConfig) -> None:
    """Gives a dense model low-rank layers of the config's ranks, without values, in place."""
    for name, rank in (config.ranks or {}).items():
        if rank is not None:
            replace_layer_(model, name, empty_lowrank(model.get_submodule(name), rank))
    attach_config_(model, config)


def digest_of(*parts: Any) -> str:
    """Hash of models, batches, data sets and plain values."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        _add(digest, part)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, part: Any) -> None:  # noqa: ANN401
    if isinstance(part, nn.Module):
        digest.update(repr(part).encode())
        _add(digest, part.state_dict())
    elif isinstance(part, torch.Tensor):
        update_digest(digest, "", part)
    elif isinstance(part, Mapping):
        for name in sorted(part):
            digest.update(f"{name}:".encode())
            _add(digest, part[name])
    elif isinstance(part, (list, tuple)) and part and isinstance(part[0], (int, float)):
        digest.update(repr(part).encode())  # token ids: millions of them
    elif isinstance(part, Iterable) and not isinstance(part, (str, bytes)):
        digest.update(b"[")
        for item in part:
            _add(digest, item)
        digest.update(b"]")
    else:
        digest.update(f"{type(part).__name__} {part!r};".encode())

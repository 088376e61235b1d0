"""A folder of finished moments and spectra, so that a killed or repeated run goes on from there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.decomposition.spectrum import Factors, Spectrum
from hf_lowrank.errors import StorageError
from hf_lowrank.files import atomic_file
from hf_lowrank.format.feed_forward import FeedForward
from hf_lowrank.measuring.items import Batch, LossFunction

# Spectra, factors, and reasons of failures, by layer name.
Decompositions = tuple[dict[str, Spectrum], dict[str, Factors], dict[str, str]]
# Which settings the cached results depend on, beside the model and the calibration data.
_MOMENT_SETTINGS = ("label_source", "seed")
_SPECTRUM_SETTINGS = (
    *_MOMENT_SETTINGS,
    "metric",
    "input_damping",
    "output_damping",
    "activation_alpha",
)
_SECOND_MOMENTS = ("input", "input_whole", "input_centred", "output")
_PLAIN_MOMENTS = ("input_abs", "gradient_rows", "gradient")


class RunCache:
    """Moments and spectra of one model on one calibration set.

    Each group of layers is one safetensors file. The file's name is a hash of the model's
    weights, the calibration tensors and the settings that matter, so a stale entry is never read.

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
        digest.update(_description(model).encode())
        named: Any = (
            loss_function if hasattr(loss_function, "__qualname__") else type(loss_function)
        )
        digest.update(f"{named.__module__}.{named.__qualname__}".encode())
        if dataclasses.is_dataclass(loss_function):
            digest.update(repr(loss_function).encode())
        for name, tensor in model.state_dict().items():
            update_digest(digest, name, tensor)
        for batch in calibration:
            for name in sorted(batch):
                update_digest(digest, name, batch[name])
        self.inputs_digest = digest.hexdigest()

    def read_spectra(self, names: list[str]) -> Decompositions | None:
        """Spectra, factors and failures of a group of layers, or None if they are not there."""
        found = _read(self._path("spectra", names, _SPECTRUM_SETTINGS))
        if found is None:
            return None
        tensors, failures = found
        spectra, factors = {}, {}
        for name in names:
            if name not in failures:
                left, right = tensors[f"{name}/left"], tensors[f"{name}/right"]
                factors[name] = Factors(left, right)
                shape = (left.shape[0], right.shape[1])
                sigma, price = tensors[f"{name}/sigma"], tensors.get(f"{name}/price")
                spectra[name] = Spectrum(shape, sigma, price)
        return spectra, factors, failures

    def write_spectra(self, names: list[str], found: Decompositions) -> None:
        """Stores a group's decompositions; raises StorageError where that is not possible."""
        spectra, factors, failures = found
        tensors: dict[str, torch.Tensor] = {}
        for name, spectrum in spectra.items():
            tensors |= {f"{name}/left": factors[name].left, f"{name}/right": factors[name].right}
            tensors[f"{name}/sigma"] = spectrum.sigma
            if spectrum.price is not None:
                tensors[f"{name}/price"] = spectrum.price
        _write(self._path("spectra", names, _SPECTRUM_SETTINGS), tensors, failures)

    def read_orders(self, blocks: Sequence[FeedForward]) -> dict[str, ChannelOrder] | None:
        """Channel order of each feed-forward, keyed by its output layer; None if not there."""
        found = _read(self._path("channels", [b.output for b in blocks], _SPECTRUM_SETTINGS))
        if found is None:
            return None
        tensors, counts = found
        return {
            block.output: ChannelOrder(
                block,
                order=tensors[f"{block.output}/order"],
                counts=counts[block.output],
                rises=tensors[f"{block.output}/rises"],
                moment=tensors[f"{block.output}/moment"],
            )
            for block in blocks
            if block.output in counts
        }

    def write_orders(
        self, blocks: Sequence[FeedForward], orders: Mapping[str, ChannelOrder]
    ) -> None:
        """Stores the channels of a group's feed-forwards; raises StorageError like the others."""
        tensors = {
            f"{name}/{part}": getattr(order, part)
            for name, order in orders.items()
            for part in ("order", "rises", "moment")
        }
        counts = {name: order.counts for name, order in orders.items()}
        path = self._path("channels", [block.output for block in blocks], _SPECTRUM_SETTINGS)
        _write(path, tensors, counts)

    def read_moments(
        self, names: list[str], needs: frozenset[str], whole: Sequence[str] = ()
    ) -> dict[str, Moments] | None:
        """Moments of a group of layers, or None if they are not there."""
        found = _read(self._moment_path(names, needs, whole))
        if found is None:
            return None
        tensors, layout = found
        shared = {
            key: SecondMoment(tensors[key], squares, size)
            for key, (squares, size) in layout["second_moments"].items()
        }
        return {
            name: Moments(
                **_parts(shared, tensors, name, entry),
                tokens=entry["tokens"],
                losses=entry["losses"],
            )
            for name, entry in layout["layers"].items()
        }

    def write_moments(
        self,
        names: list[str],
        needs: frozenset[str],
        moments: dict[str, Moments],
        whole: Sequence[str] = (),
    ) -> None:
        """Stores a group's moments, shared ones once; raises StorageError like the other."""
        tensors: dict[str, torch.Tensor] = {}
        keys: dict[int, str] = {}
        layout: dict[str, Any] = {"second_moments": {}, "layers": {}}
        for name, moment in moments.items():
            second = {p: getattr(moment, p) for p in _SECOND_MOMENTS if getattr(moment, p)}
            for part, value in second.items():
                key = keys.setdefault(id(value), f"{name}/{part}")
                tensors[key] = value.matrix
                layout["second_moments"][key] = (value.squares, value.size)
            plain = [p for p in _PLAIN_MOMENTS if getattr(moment, p) is not None]
            tensors |= {f"{name}/{part}": getattr(moment, part) for part in plain}
            layout["layers"][name] = {
                "second_moments": {part: keys[id(value)] for part, value in second.items()},
                "plain": plain,
                "tokens": moment.tokens,
                "losses": moment.losses,
            }
        _write(self._moment_path(names, needs, whole), tensors, layout)

    def _moment_path(self, names: list[str], needs: frozenset[str], whole: Sequence[str]) -> Path:
        wanted = [*sorted(needs), *(f"{name}/whole" for name in whole)]
        return self._path("moments", [*names, *wanted], _MOMENT_SETTINGS)

    def _path(self, kind: str, names: list[str], settings: tuple[str, ...]) -> Path:
        values = {name: getattr(self.config, name) for name in settings}
        key = json.dumps([kind, self.inputs_digest, values, names], sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / f"{kind}-{digest}.safetensors"


def _parts(
    shared: dict[str, SecondMoment],
    tensors: dict[str, torch.Tensor],
    name: str,
    entry: dict[str, Any],
) -> dict[str, Any]:
    """The tensors of one layer's moments by field name."""
    second = {part: shared[key] for part, key in entry["second_moments"].items()}
    return second | {part: tensors[f"{name}/{part}"] for part in entry["plain"]}


def _description(model: nn.Module) -> str:
    """What a model computes beside its weights: its modules and its config."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {k: v for k, v in settings.items() if not k.startswith("_")}
    return json.dumps([repr(model), settings], sort_keys=True, default=str)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    try:
        with safe_open(path, framework="pt") as file:
            layout: dict[str, Any] = json.loads(file.metadata()["layout"])
            return {key: file.get_tensor(key) for key in file.keys()}, layout  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # not there, or cut off by something other than this code: compute it again


def _write(path: Path, tensors: dict[str, torch.Tensor], layout: dict[str, Any]) -> None:
    """Writes under a temporary name and renames, so no half-written file is ever read."""
    try:
        with atomic_file(path) as temporary:
            save_file(_unshared(tensors), temporary, metadata={"layout": json.dumps(layout)})
    except (OSError, SafetensorError) as error:
        raise StorageError(f"Could not write to the cache folder {path.parent}: {error}") from error


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU, none of which share memory: safetensors refuses that."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        cpu = tensor.cpu().contiguous()
        result[key] = cpu.clone() if cpu.data_ptr() in seen else cpu
        seen.add(cpu.data_ptr())
    return result


def update_digest(digest: hashlib.blake2b, name: str, tensor: torch.Tensor) -> None:
    """Adds a tensor to a hash: name, dtype, shape and bytes."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    digest.update(flat.view(torch.uint8).numpy().tobytes())

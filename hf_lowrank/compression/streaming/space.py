"""How much disk and memory a compression takes, estimated before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.compression.options import Run
from hf_lowrank.compression.prices import DRAWS
from hf_lowrank.compression.streaming.block_stream import BlockStream
from hf_lowrank.errors import StorageError
from hf_lowrank.evaluation.size import model_sizes
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.measuring.batches import token_shape
from hf_lowrank.measuring.items import Batch
from hf_lowrank.measuring.progress import announce

# Measured peak of `compress` over the bytes of the weights, see docs/LOG.md.
IN_MEMORY = 4.8
_FP32 = 4
# Last hidden states that probes leave behind: a tolerance needs at most eight halvings to 0.005, of
# which every third probe is one, and a few plans are measured beside.
_PROBES = 30


def disk_bytes(stream: BlockStream, named: Mapping[str, nn.Module], run: Run) -> int:
    """Bytes of all that lies in the work folder at once, at most, but for what masks take."""
    shapes = [linear_shape(layer) for layer in named.values()]
    factors = sum((rows + columns) * min(rows, columns) for rows, columns in shapes)
    channels = sum(columns**2 for rows, columns in shapes if columns > rows)
    model: Any = stream.model
    width = int(model.get_input_embeddings().weight.shape[1])
    element = int(model.dtype.itemsize)
    levels = len(stream) + 1
    tokens = {role: _tokens(getattr(run.texts, role)) for role in ("calibration", "held_out")}
    tokens["judged"] = _tokens(run.texts.evaluation) + _tokens(run.texts.foreign)
    states = tokens["calibration"] * (levels + 2) + tokens["judged"] * 4
    states += tokens["held_out"] * ((2 + DRAWS) * levels + _PROBES)
    written = model_sizes(model)[1]
    return _FP32 * (factors + channels) + states * width * element + written


def _tokens(batches: Sequence[Batch] | None) -> int:
    shapes = (token_shape(batch) for batch in batches or [])
    return sum(shape.numel() for shape in shapes if shape is not None)


def check_space(
    stream: BlockStream, named: Mapping[str, nn.Module], run: Run, place: Path, progress: bool
) -> None:
    """Says how much disk the run takes, and refuses where there is less.

    Raises:
        StorageError: With what is needed and what is left.
    """
    place.mkdir(parents=True, exist_ok=True)
    wanted = disk_bytes(stream, named, run)
    there = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free + there
    if progress:
        announce(f"needs about {wanted / 1e9:.1f} GB of disk, {free / 1e9:.0f} GB are free")
    if wanted > free:
        raise StorageError(
            f"{place.parent}: compressing block by block needs about {wanted / 1e9:.1f} GB of disk "
            f"for a while, but only {free / 1e9:.1f} GB are free; name another work folder, or "
            "use less text."
        )

"""What config.json says of a checkpoint's layers: `Layout`, plain data with no torch behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_lowrank.errors import CheckpointError

QUANT_METHOD = "lowrank"
FORMAT_VERSION = 2
# Version 1 has no layer in the compact form.
READABLE_VERSIONS = (1, 2)


@dataclass(frozen=True)
class Layout:
    """The stored form of every compressed layer.

    Attributes:
        ranks: Module name to rank; None for a layer that stayed dense or was narrowed.
        narrowed: Module name to (out_features, in_features), for layers that lost channels.
        form: Name of the stored form of the layers in `ranks`.
    """

    ranks: Mapping[str, int | None]
    narrowed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    form: str = "factors"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Layout:
        """Reads the `quantization_config` of a config.json.

        What else stands there tells how the checkpoint was made; no reader needs it.

        Raises:
            CheckpointError: The version is another, or a value is none that a writer would write.
        """
        check_version(settings.get("format_version"))
        form = settings.get("form", "factors")
        if not isinstance(form, str):
            raise CheckpointError(f"form must be the name of a stored form, got {form!r}.")
        ranks, narrowed = settings.get("ranks"), settings.get("narrowed")
        if not isinstance(ranks, dict):
            raise CheckpointError(
                "config.json names quant_method 'lowrank' but holds no ranks; the checkpoint is "
                "incomplete."
            )
        if not isinstance(narrowed, (dict, type(None))):
            raise CheckpointError(f"narrowed must map names to shapes, got {narrowed!r}.")
        for name, rank in ranks.items():
            if rank is not None and not _is_count(rank):
                raise CheckpointError(f"ranks[{name!r}] must be an integer >= 1, got {rank!r}.")
        return cls(ranks, {n: _shape(n, s, ranks) for n, s in (narrowed or {}).items()}, form)


def check_version(version: object) -> None:
    """Refuses a checkpoint of another layout.

    Raises:
        CheckpointError: With the versions that are read.
    """
    if isinstance(version, bool) or version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"config.json has format_version {version!r}, this hf_lowrank reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}; update hf_lowrank or check the file."
        )


def _shape(name: str, shape: object, ranks: Mapping[str, int | None]) -> tuple[int, int]:
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape))):
        raise CheckpointError(
            f"narrowed[{name!r}] must be [out_features, in_features], got {shape!r}."
        )
    if ranks.get(name) is not None:
        raise CheckpointError(f"{name} has both a rank and a narrowed shape.")
    return shape[0], shape[1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

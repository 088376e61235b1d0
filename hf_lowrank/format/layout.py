"""What config.json says of a checkpoint's layers: `Layout`, plain data with no torch behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_lowrank.errors import CheckpointError

QUANT_METHOD = "lowrank"
FORMAT_VERSION = 2
EXPERTS_VERSION = 3
# Version 1 has no layer in the compact form, and no quantized weight; 2 has no smaller experts.
READABLE_VERSIONS = (1, 2, EXPERTS_VERSION)
BITS = (4, 8)


@dataclass(frozen=True)
class Precision:
    """How the numbers of a quantized weight are stored.

    Attributes:
        bits: Of each number, 4 or 8.
        block: (rows, columns) of the numbers that share a scale.
    """

    bits: int
    block: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.bits} bits in blocks of {self.block[0]} x {self.block[1]}"

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"bits": self.bits, "block": list(self.block)}

    @classmethod
    def from_json(cls, name: str, value: object) -> Precision:
        """Reads what config.json says of a matrix.

        Raises:
            CheckpointError: It is none that a writer would write.
        """
        known = value if isinstance(value, dict) else {}
        bits, block = known.get("bits"), known.get("block", ())
        if isinstance(bits, bool) or bits not in BITS or not _is_pair(block):
            raise CheckpointError(
                f'quantized[{name!r}] must be {{"bits": 4 or 8, "block": [rows, columns]}}, got '
                f"{value!r}."
            )
        return cls(bits, (block[0], block[1]))


@dataclass(frozen=True)
class ExpertsLeft:
    """What is left of the fused experts of a layer.

    Attributes:
        experts: How many there are.
        width: Inner channels of each.
    """

    experts: int
    width: int

    def __str__(self) -> str:
        return f"{self.experts} experts of {self.width} channels"

    def to_json(self) -> dict[str, int]:
        """As it stands in config.json."""
        return {"experts": self.experts, "width": self.width}

    @classmethod
    def from_json(cls, name: str, value: object) -> ExpertsLeft:
        """Reads what config.json says of the experts of a layer.

        Raises:
            CheckpointError: It is none that a writer would write.
        """
        known = value if isinstance(value, dict) else {}
        count, width = known.get("experts"), known.get("width")
        if not (_is_count(count) and _is_count(width)) or len(known) != 2:
            raise CheckpointError(
                f'experts[{name!r}] must be {{"experts": count, "width": channels}}, got {value!r}.'
            )
        return cls(int(str(count)), int(str(width)))


@dataclass(frozen=True)
class Layout:
    """The stored form of every compressed layer.

    Attributes:
        ranks: Module name to rank; None for a layer that stayed dense or was narrowed.
        narrowed: Module name to (out_features, in_features), for layers that lost channels.
        form: Name of the stored form of the layers in `ranks`.
        quantized: Name to precision, for the modules whose weight is quantized: factors, narrowed
            layers, and layers that are dense otherwise.
        experts: Module name to what is left, for fused experts that lost channels or experts.
    """

    ranks: Mapping[str, int | None]
    narrowed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    form: str = "factors"
    quantized: Mapping[str, Precision] = field(default_factory=dict)
    experts: Mapping[str, ExpertsLeft] = field(default_factory=dict)

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
        quantized, experts = settings.get("quantized"), settings.get("experts")
        if not isinstance(ranks, dict):
            raise CheckpointError(
                "config.json names quant_method 'lowrank' but holds no ranks; the checkpoint is "
                "incomplete."
            )
        for name, value, content in (
            ("narrowed", narrowed, "shapes"),
            ("quantized", quantized, "precisions"),
            ("experts", experts, "what is left"),
        ):
            if not isinstance(value, (dict, type(None))):
                raise CheckpointError(f"{name} must map names to {content}, got {value!r}.")
        for name, rank in ranks.items():
            if rank is not None and not _is_count(rank):
                raise CheckpointError(f"ranks[{name!r}] must be an integer >= 1, got {rank!r}.")
        return cls(
            ranks,
            {name: _shape(name, shape, ranks) for name, shape in (narrowed or {}).items()},
            form,
            {name: Precision.from_json(name, each) for name, each in (quantized or {}).items()},
            {name: ExpertsLeft.from_json(name, each) for name, each in (experts or {}).items()},
        )


def check_version(version: object) -> None:
    """Refuses a checkpoint of another layout.

    Raises:
        CheckpointError: With the versions that are read.
    """
    if isinstance(version, bool) or version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"config.json has format_version {version!r}, this hf_lowrank reads "
            f"{', '.join(map(str, READABLE_VERSIONS))}; update hf_lowrank or check the file."
        )


def _shape(
    name: str,
    shape: Any,  # noqa: ANN401
    ranks: Mapping[str, int | None],
) -> tuple[int, int]:
    if not _is_pair(shape):
        raise CheckpointError(
            f"narrowed[{name!r}] must be [out_features, in_features], got {shape!r}."
        )
    if ranks.get(name) is not None:
        raise CheckpointError(f"{name} has both a rank and a narrowed shape.")
    return shape[0], shape[1]


def _is_pair(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_count, value))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

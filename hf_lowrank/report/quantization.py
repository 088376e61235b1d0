"""The section of a report on weights in int8 or int4."""

from __future__ import annotations

from dataclasses import dataclass

from hf_lowrank.report.sections import Sizes


@dataclass(frozen=True)
class Quantization:
    """Targeted weights that are stored in fewer bits.

    Attributes:
        weights: "int8" or "int4".
        matrices: How many are; each factor counts.
        groups: Number of int4 matrices by how many numbers share a scale: 32, or where a side has
            no such divisor, the one nearest to it.
        bytes: Of these matrices before, in the model's dtype, and after, with the scales.
    """

    weights: str
    matrices: int
    groups: dict[str, int]
    bytes: Sizes

    def describe(self) -> str:
        """What is stored, in a sentence without a full stop."""
        groups = ", ".join(f"{size} in {count}" for size, count in self.groups.items())
        return (
            f"{self.matrices} weights of targeted layers are {self.weights}, "
            f"{self.bytes.dense / 1e6:.1f} MB -> {self.bytes.kept / 1e6:.1f} MB with their scales"
            + (f"; numbers to a scale: {groups}" if groups else ", one for each row")
        )

"""The section of a report on weights in int8 or int4."""

from __future__ import annotations

from dataclasses import dataclass

from hf_lowrank.report.sections import Sizes

MIXED = "mixed"


@dataclass(frozen=True)
class Quantization:
    """Targeted weights that are stored in fewer bits.

    Attributes:
        weights: "int8", "int4", or "mixed" for types chosen one by one.
        matrices: How many are quantized; each factor counts. Those that are not among `groups` are
            int8, with "int4" second factors and compact layers.
        groups: Number of int4 matrices by how many numbers share a scale: 32, or where a side has
            no such divisor, the one nearest to it.
        bytes: Of these matrices before, in the model's dtype, and after, with the scales.
        kept: How many stay in the model's dtype.
    """

    weights: str
    matrices: int
    groups: dict[str, int]
    bytes: Sizes
    kept: int = 0

    def describe(self) -> str:
        """What is stored, in a sentence without a full stop."""
        groups = ", ".join(f"{size} in {count}" for size, count in self.groups.items())
        rest = self.matrices - sum(self.groups.values())
        counts = [f"{sum(self.groups.values())} int4"] if groups else []
        counts += [f"{rest} int8"] if rest else []
        counts += [f"{self.kept} in their own type"] if self.kept else []
        return (
            f"weights of targeted layers: {', '.join(counts)}, "
            f"{self.bytes.dense / 1e6:.1f} MB -> {self.bytes.kept / 1e6:.1f} MB with their scales"
            + (f"; numbers to a scale in int4: {groups}" if groups else ", one for each row")
        )


@dataclass(frozen=True)
class SizeTrial:
    """A type of weights that was tried towards a size in megabytes.

    Attributes:
        weights: "int8", "int4", or None for weights as they are.
        param_ratio: Kept share of the targeted parameters with which it fits.
        bytes: Of the file.
        loss_difference: Rise of the loss on held-out text, nats.
    """

    weights: str | None
    param_ratio: float
    bytes: int
    loss_difference: float

    def describe(self) -> str:
        """What was tried and measured, in a line."""
        return (
            f"tried: {self.weights or 'own type'}, {self.param_ratio:.2%} of the parameters, "
            f"{self.bytes / 1e6:.1f} MB: {self.loss_difference:+.4f} on held-out text"
        )

"""Layer names as places in a model: which block, and which layer in it."""

from __future__ import annotations

from collections.abc import Iterable

from hf_lowrank.ranks.plan import layer_cost
from hf_lowrank.report.schema import Report


def split_name(name: str) -> tuple[str, str]:
    """(block, layer in the block): `model.layers.3.mlp.up_proj` is `model.layers.3`, `mlp.up_proj`.

    A name without a number in the middle is in the block "".
    """
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: position + 1]), ".".join(parts[position + 1 :])
    return "", name


def block_number(name: str) -> int:
    """The first number in a layer's name: which block it is in; 0 without one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def by_type(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer names by what they are called in their block, in the order of the model."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(split_name(name)[1], []).append(name)
    return found


def short_block_names(blocks: Iterable[str]) -> dict[str, str]:
    """Block numbers alone where all blocks are of one list, else the full names."""
    blocks = list(blocks)
    lists = {block.rpartition(".")[0] for block in blocks if block}
    return {block: block.rpartition(".")[2] if len(lists) == 1 else block for block in blocks}


def kept_shares(report: Report) -> dict[str, float]:
    """Kept / dense parameters of every layer whose shape the report knows."""
    shares, form = {}, str(report.config.others.get("form", "factors"))
    for name, rank in report.ranks.items():
        if rank is None and name not in report.narrowed:
            shares[name] = 1.0
        elif name in report.spectra:
            dense = report.spectra[name].shape
            left = report.narrowed.get(name, dense)
            shares[name] = layer_cost(left, rank, form) / (dense[0] * dense[1])
    return shares


def channels_left(report: Report) -> dict[str, int]:
    """Channels of every narrowed layer whose dense shape the report knows."""
    found = {}
    for name, shape in report.narrowed.items():
        if name in report.spectra:
            is_out_of_them = shape[0] == report.spectra[name].shape[0]
            found[name] = shape[1] if is_out_of_them else shape[0]
    return found


def expert_rows(report: Report) -> list[list[str]]:
    """What is left of the fused experts, a row for each kind of layer, with a header."""
    rows = [
        ["experts", "layers", "each of", "fewest", "mean", "channels of", "fewest", "mean"],
    ]
    for kind, names in by_type(report.experts).items():
        plans = [report.experts[name] for name in names]
        row = [kind, str(len(plans))]
        for field in ("experts", "width"):
            left = [getattr(each, field) for each in plans]
            dense = max(each.dense[field == "width"] for each in plans)
            row += [str(dense), str(min(left)), f"{sum(left) / len(left):.1f}"]
        rows.append(row)
    return rows

"""How the speed in a report is told: rows, columns, and under which conditions it was measured."""

from __future__ import annotations

from collections.abc import Sequence

from hf_lowrank.report.schema import Report

_PHASES = ("prefill", "decode")


def speed_rows(report: Report) -> list[list[str]]:
    """A row for prefill and one for decode: what, dense, compressed, speed-up; none without it."""
    if report.speed is None:
        return []
    rows = []
    for phase in _PHASES:
        key = f"{phase}_tokens_per_second"
        dense, compressed = report.speed["dense"][key], report.speed["compressed"][key]
        label = f"{phase} (tokens/s)"
        rows.append([label, f"{dense:,.1f}", f"{compressed:,.1f}", f"{compressed / dense:.2f}x"])
    return rows


def speed_note(report: Report) -> str:
    """How the speed was measured, and how far its rounds differ; "" without it."""
    if report.speed is None:
        return ""
    settings = report.speed["settings"]
    ranges = []
    for phase in _PHASES:
        pairs = zip(report.speed["dense"][phase], report.speed["compressed"][phase], strict=True)
        ups = [dense / compressed for dense, compressed in pairs]
        ranges.append(f"{phase} {min(ups):.2f}x to {max(ups):.2f}x")
    return (
        f"speed on the machine of this run alone ({speed_conditions(report)}): medians of "
        f"{settings['rounds']} rounds in which both models took turns; speed-up round by round: "
        f"{', '.join(ranges)}"
    )


def speed_conditions(report: Report) -> str:
    """Machine and amount of work, the same for speeds that may be compared; "" without them."""
    if report.speed is None:
        return ""
    settings = report.speed["settings"]
    return (
        f"{settings['hardware']}, device {settings['device']}, CPU threads: {settings['threads']}, "
        f"{settings['dtype']}; batch size {settings['batch_size']}, {settings['prompt_tokens']} "
        f"tokens read at once, then {settings['new_tokens']} one by one"
    )


def speed_columns(reports: Sequence[Report]) -> list[list[str]]:
    """Speed-ups for a table with a line for each report, header first; empty if none has any."""
    if all(report.speed is None for report in reports):
        return [[] for _ in range(len(reports) + 1)]
    cells = [[row[3] for row in speed_rows(report)] or ["-"] * 2 for report in reports]
    return [[f"{phase} speed-up" for phase in _PHASES], *cells]

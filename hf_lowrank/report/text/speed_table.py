"""How the speed in a report is told: rows, columns, and under which conditions it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Speed, SpeedConditions

_PHASES = ("prefill", "decode")


def speed_rows(report: Report) -> list[list[str]]:
    """A row for prefill and one for decode: what, dense, compressed, speed-up; none without it."""
    if report.speed is None:
        return []
    before, after = report.speed.dense, report.speed.compressed
    return [
        [f"{phase} (tokens/s)", f"{dense:,.1f}", f"{compressed:,.1f}", f"{compressed / dense:.2f}x"]
        for phase, dense, compressed in (
            ("prefill", before.prefill_tokens_per_second, after.prefill_tokens_per_second),
            ("decode", before.decode_tokens_per_second, after.decode_tokens_per_second),
        )
    ]


def speed_notes(report: Report) -> list[str]:
    """What time was predicted, and where and how the speed was measured."""
    shares = ", ".join(f"{phase} {part:.2f}" for phase, part in report.predicted_time.items())
    said = f"targeted layers' time over dense, as their shapes were timed: {shares}"
    return [said] * bool(shares) + ([] if report.speed is None else _conditions(report.speed))


def _conditions(speed: Speed) -> list[str]:
    """Where and how the speed was measured, and how far its rounds differ."""
    settings = speed.settings
    before, after = speed.dense, speed.compressed
    ranges = []
    for phase, dense, compressed in (
        ("prefill", before.prefill, after.prefill),
        ("decode", before.decode, after.decode),
    ):
        ups = [old / new for old, new in zip(dense, compressed, strict=True)]
        ranges.append(f"{phase} {min(ups):.2f}x to {max(ups):.2f}x")
    place = f"speed on the machine of this run alone: {_machine(settings)}"
    if settings.rounds == 1:
        return [place, f"timed: {_work(settings)}; one round only, so its noise is not known"]
    return [
        place,
        f"timed: {_work(settings)}; medians of {settings.rounds} rounds, both models in turn",
        f"speed-up from round to round: {', '.join(ranges)}",
    ]


def speed_conditions(report: Report) -> str:
    """Machine and work of a speed, the same for speeds that may be compared; "" without it."""
    if report.speed is None:
        return ""
    settings = report.speed.settings
    return f"{_machine(settings)}, {_work(settings)}"


def _machine(settings: SpeedConditions) -> str:
    threads = f"{settings.threads} CPU thread{'' if settings.threads == 1 else 's'}"
    return f"{settings.hardware}, device {settings.device}, {threads}, {settings.dtype}"


def _work(settings: SpeedConditions) -> str:
    return (
        f"batch size {settings.batch_size}, {settings.prompt_tokens} tokens read at once "
        f"(prefill), then {settings.new_tokens} one by one (decode)"
    )


def speed_columns(reports: Sequence[Report]) -> list[list[str]]:
    """Speed-ups for a table with a line for each report, header first; empty if none has any."""
    if all(report.speed is None for report in reports):
        return [[] for _ in range(len(reports) + 1)]
    cells = [[row[3] for row in speed_rows(report)] or ["-"] * 2 for report in reports]
    return [[f"{phase} speed-up" for phase in _PHASES], *cells]


def speed_comparison(reports: Mapping[str, Report]) -> list[list[str]]:
    """Runs side by side, a line for each that was timed, with a header.

    Args:
        reports: Report by the name of its run.
    """
    header = ["run (tokens/s)"]
    for phase in _PHASES:
        header += [f"{phase} dense", "compressed", "speed-up"]
    rows = [header]
    for name, report in reports.items():
        cells = [cell for row in speed_rows(report) for cell in row[1:]]
        rows += [[name, *cells]] if cells else []
    return rows

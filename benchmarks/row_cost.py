"""What the rows of a table of task runs cost, as far as their reports say, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_lowrank.tasks.task_arguments import CUTS, LPAF_VARIANTS
from hf_lowrank.tasks.task_report import TaskReport


def known_costs(report: TaskReport) -> dict[str, Any]:
    """What a report says of the cost: `decompositions` and `restored`, where it does."""
    found: dict[str, Any] = {}
    if report.selections is not None:
        found["decompositions"] = sum(each.decompositions for each in report.selections)
    elif report.joint is not None:
        found["decompositions"] = report.joint.decompositions
    elif report.switch is not None:  # a profile takes the singular values of every target
        found["decompositions"] = (len(report.switch.profiles) + 1) * len(report.ranks)
    elif report.method in {*CUTS, *LPAF_VARIANTS} and not report.refusal:
        found["decompositions"] = len(report.ranks)  # of each target once
    elif report.method == "dense":
        found["decompositions"] = 0
    if report.lpaf and report.lpaf.restored:
        found["restored"] = report.lpaf.restored
    return found


def format_costs(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what each row's run cost, see `run_row`; empty where no row says it."""
    lines = [["row", "seconds", "decompositions", "forward", "backward", "peak MiB", "restored"]]
    lines.append(["---", *["---:"] * 5, "---"])
    for row in (row for row in rows if "cost" in row):
        cost, size = row["cost"], "" if row["param_ratio"] is None else f" {row['param_ratio']:g}"
        lines.append(
            [
                f"{row['task']}{size} {row['method']}, seed {row['seed']}",
                f"{cost['seconds']:.1f}",
                str(cost.get("decompositions", "")),
                str(cost["forwards"]),
                str(cost["backwards"]),
                f"{cost['peak_mib']:.0f}",
                ", ".join(cost.get("restored", [])),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""

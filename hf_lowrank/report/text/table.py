"""Reports as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_lowrank.report.layers import channels_left
from hf_lowrank.report.schema import Evaluation, Report
from hf_lowrank.report.task_report import TaskReport
from hf_lowrank.report.text.speed_table import (
    speed_columns,
    speed_comparison,
    speed_conditions,
    speed_notes,
    speed_rows,
)

FOREIGN = ", foreign text"


def format_report(report: Report) -> str:
    """One report as a table of what changed, the ranks by layer type and the seconds."""
    parameters, size = report.parameters, report.bytes
    rows = [
        ["", "dense", "compressed", "kept"],
        ["parameters", f"{parameters['dense']:,}", f"{parameters['kept']:,}", _share(parameters)],
        [
            "  in targeted layers",
            f"{parameters['targeted_dense']:,}",
            f"{parameters['targeted_kept']:,}",
            f"{parameters['targeted_kept'] / parameters['targeted_dense']:.2%}",
        ],
        ["megabytes", f"{size['dense'] / 1e6:.1f}", f"{size['kept'] / 1e6:.1f}", _share(size)],
    ]
    lines = []
    for what, (found, source) in evaluations(report).items():
        rows.append(
            [f"perplexity{what}", f"{found.perplexity_before:.2f}", f"{found.perplexity_after:.2f}"]
        )
        loss = [f"{found.loss_before:.4f}", f"{found.loss_after:.4f}"]
        rows.append([f"loss (nats/token){what}", *loss])
        lines.append(
            f"loss difference {found.loss_difference:+.4f} +- {found.standard_error:.4f} nats "
            f"per token, over {found.tokens:,} tokens of "
            + (f"foreign text ({source}), unlike the calibration's" if what else "evaluation text")
        )
    if report.predicted_loss_difference is not None:
        lines.append(f"predicted by the prices: {report.predicted_loss_difference:+.4f}")
    if report.measured_prices:
        factors = [part["factor"] for part in report.measured_prices]
        lines.append(
            f"prices of {len(factors)} parts corrected by measurement: factors "
            f"{min(factors):.2f} to {max(factors):.2f}"
        )
    for stage in report.stages or [{"recovery": report.recovery}]:
        recovery = stage["recovery"]
        if recovery is None:
            continue
        place = f" at {stage['param_ratio']:g}" if report.stages else ""
        lines.append(
            f"recovery{' by LoRA' if recovery.get('kind') == 'lora' else ''}{place}, "
            f"{recovery['steps']} steps: held-out loss {recovery['loss_before']:.4f} -> "
            f"{recovery['loss_after']:.4f}, {'kept' if recovery['accepted'] else 'not kept'}"
        )
    if report.joint is not None:
        baseline, accepted = report.joint["baseline"], report.held_out or {"mean": float("nan")}
        lines.append(
            f"joint: accepted {report.joint['method']!r} at {accepted['mean']:+.4f} on the "
            f"acceptance set; price alone {baseline['mean']:+.4f}, keeping "
            f"{report.joint['baseline_ratio']:.2%}"
        )
    rows += speed_rows(report)
    lines += speed_notes(report)
    parts = [align(rows), *lines, *_search_lines(report), "", align(rank_rows(report)), ""]
    parts.append(
        "seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    )
    return "\n".join(parts + warnings(report))


def evaluations(report: Report) -> dict[str, tuple[Evaluation, str]]:
    """What was measured with its source, by what a row's label ends in: "" and on foreign text."""
    found = {
        "": (report.evaluation, report.data.get("evaluation")),
        FOREIGN: (report.foreign_evaluation, report.data.get("foreign")),
    }
    return {
        what: (measured, str(source or "source not recorded"))
        for what, (measured, source) in found.items()
        if measured is not None
    }


def format_sweep(reports: Sequence[Report]) -> str:
    """Several sizes side by side, one line each."""
    rows = [["param_ratio", "kept parameters", "perplexity", "loss difference", "standard error"]]
    for report in reports:
        kept, found = report.parameters["targeted_kept"], report.evaluation
        rows.append(
            [
                f"{kept / report.parameters['targeted_dense']:.4f}",
                f"{report.parameters['kept']:,}",
                "-" if found is None else f"{found.perplexity_after:.2f}",
                "-" if found is None else f"{found.loss_difference:+.4f}",
                "-" if found is None else f"{found.standard_error:.4f}",
            ]
        )
    foreign = [report.foreign_evaluation for report in reports]
    if any(foreign):
        rows[0].append(f"perplexity{FOREIGN}")
        for row, measured in zip(rows[1:], foreign, strict=True):
            row.append("-" if measured is None else f"{measured.perplexity_after:.2f}")
    return align([row + more for row, more in zip(rows, speed_columns(reports), strict=True)])


def comparison_rows(reports: Mapping[str, Report]) -> list[list[str]]:
    """Runs side by side, a line for each, with a header.

    Args:
        reports: Report by the name of its run.
    """
    header = ["run", "MB", "perplexity", "loss difference", "+-", "param_ratio"]
    rows = [[*header, "MB dense", "perplexity dense", "ranks by", "seconds"]]
    for name, report in reports.items():
        parameters, found, config = report.parameters, report.evaluation, report.config
        before, after = ("-", ["-"] * 3) if found is None else _quality(found)
        kept = parameters["targeted_kept"] / parameters["targeted_dense"]
        sizes = {side: f"{count / 1e6:.1f}" for side, count in report.bytes.items()}
        words = [str(config[key]) for key in ("metric", "rule") if config.get(key)]
        words += [word for word in ("channels", "measured_prices") if config.get(word)]
        if any(kept_steps(report)):
            words.append(f"{sum(kept_steps(report))} steps of recovery")
        if report.stages:
            words.append(f"{len(report.stages)} stages")
        how = ", ".join(words)
        seconds = f"{sum(report.seconds.values()):.1f}"
        rows.append(
            [name, sizes["kept"], *after, f"{kept:.4f}", sizes["dense"], before, how, seconds]
        )
    return rows


def kept_steps(report: Report) -> list[int]:
    """Steps of training after each cut, 0 where held-out text rejected what they gave."""
    recoveries = [stage["recovery"] for stage in report.stages] or [report.recovery]
    return [each["steps"] if each["accepted"] else 0 for each in recoveries if each]


def _quality(found: Evaluation) -> tuple[str, list[str]]:
    """Dense perplexity; perplexity, loss difference and its standard error after compression."""
    return number(found.perplexity_before, ".2f"), [
        number(found.perplexity_after, ".2f"),
        number(found.loss_difference, "+.4f"),
        number(found.standard_error, ".4f"),
    ]


def differences(reports: Mapping[str, Report]) -> list[str]:
    """Reasons why figures of these runs can't be compared directly."""
    found = []
    for what, values in (
        ("dense models", {report.model for report in reports.values()}),
        ("evaluation texts", {str(report.data.get("evaluation")) for report in reports.values()}),
        (
            "numbers of evaluation tokens",
            {str(r.evaluation and r.evaluation.tokens) for r in reports.values()},
        ),
        (
            "conditions of the speed",
            {speed_conditions(report) for report in reports.values() if report.speed},
        ),
    ):
        if len(values) > 1:
            found.append(f"different {what} ({', '.join(sorted(values))})")
    return found


def format_comparison(reports: Mapping[str, Report]) -> str:
    """Runs side by side as text, with what makes them hard to compare."""
    notes = [f"not comparable at sight: {each}" for each in differences(reports)]
    parts = [align(comparison_rows(reports))]
    if any(report.speed for report in reports.values()):
        parts += ["", align(speed_comparison(reports))]
    return "\n".join([*parts, *notes])


def describe_run(report: Report) -> str:
    """Goal, metric and rule in a sentence."""
    if report.training is not None:
        return f"{_describe_training(report.training)}; seed {report.seed}."
    config = report.config
    goals = {
        "param_ratio": "at most {:.1%} of the targeted layers' weights kept",
        "loss_tolerance": "the smallest model within {} nats per token of the dense one",
        "rank": "rank {} everywhere",
    }
    if isinstance(report, TaskReport):
        goals["loss_tolerance"] = "the smallest model within {} nats of the dense one"
    found = [
        text.format(config[name]) for name, text in goals.items() if config.get(name) is not None
    ]
    rule = config.get("rule")
    how = f"metric {config.get('metric')}" + (f", rule {rule}" if rule else "")
    how += ", prices measured part by part" if config.get("measured_prices") else ""
    what = "Ranks, and channels of feed-forwards," if config.get("channels") else "Ranks"
    goal = found[0] if found else "a loss tolerance"
    stages = f", in {len(report.stages)} stages" if report.stages else ""
    said = f"Goal: {goal}{stages}. {what} by {how}; seed {report.seed}."
    if not any(kept_steps(report)):
        return said
    after = "each cut" if report.stages else "the cut"
    steps = " and ".join(str(count) for count in kept_steps(report))
    return f"{said} After {after} {steps} steps of training towards the dense model."


def _describe_training(training: Mapping[str, Any]) -> str:
    ratio = training["param_ratio"]
    goal = (
        f"each raising the loss by at most {training['tolerance']:g} nats"
        if ratio is None
        else f"down to {ratio:.1%} of the targeted layers' weights"
    )
    epochs = counted(training["epochs"], "epoch")
    selections = counted(training["selections"], "selection")
    return (
        f"Trained for {epochs} (learning rate {training['learning_rate']:g}) from full rank, with "
        f"{selections} of ranks by rule {training['rule']}, {goal}"
    )


def counted(amount: float, what: str) -> str:
    """`1 epoch`, `2.5 epochs`."""
    return f"{amount:g} {what}{'' if amount == 1 else 's'}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    )


def _share(counts: dict[str, int]) -> str:
    return f"{counts['kept'] / counts['dense']:.2%}"


def _search_lines(report: Report) -> list[str]:
    if not report.probes:
        return []
    accepted = report.held_out or {"mean": 0.0, "standard_error": 0.0}
    return [
        "",
        align(probe_rows(report)),
        f"accepted: {accepted['mean']:+.4f} +- {accepted['standard_error']:.4f} nats per token on "
        "held-out calibration text",
    ]


def probe_rows(report: Report) -> list[list[str]]:
    """The steps of the search for a loss tolerance, with a header."""
    rows = [["probe: param_ratio", "predicted", "measured", "+-", "within"]]
    for probe in report.probes:
        rows.append(
            [
                f"{probe['param_ratio']:.4f}",
                number(probe["predicted"], "+.4f"),
                number(probe["measured"], "+.4f"),
                number(probe["standard_error"], ".4f"),
                ("yes" if probe["feasible"] else "no") + ("" if probe["complete"] else " (early)"),
            ]
        )
    return rows


def stage_rows(report: Report) -> list[list[str]]:
    """The cuts of a compression in stages and the training after each, with a header."""
    rows = [["kept", "rise predicted for the cut", "steps", "held-out loss", "after training", ""]]
    for stage in report.stages:
        trained = stage["recovery"]
        rows.append(
            [
                f"{stage['param_ratio']:.1%}",
                number(stage["predicted_loss_difference"], "+.4f"),
                str(trained["steps"]),
                number(trained["loss_before"], ".4f"),
                number(trained["loss_after"], ".4f"),
                "kept" if trained["accepted"] else "not kept",
            ]
        )
    return rows


def number(value: float | None, spec: str) -> str:
    """A number in a format, or "-" where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, spec)


def rank_rows(report: Report) -> list[list[str]]:
    """Ranks, and channels where some were taken out, by layer type, with a header."""
    by_type: dict[str, list[str]] = {}
    for name in report.ranks:
        by_type.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    header = ["layer type", "layers", "dense", "smallest rank", "mean rank", "largest rank"]
    left = channels_left(report)
    if report.narrowed:
        header += ["narrowed", "fewest channels", "mean channels", "most channels"]
    rows = [header]
    for kind, names in by_type.items():
        given = [rank for name in names if (rank := report.ranks[name]) is not None]
        narrowed = sum(name in report.narrowed for name in names)
        dense = len(names) - len(given) - narrowed
        row = [kind, str(len(names)), str(dense), *_range(given)]
        if report.narrowed:
            row += [str(narrowed), *_range([left[name] for name in names if name in left])]
        rows.append(row)
    return rows


def _range(values: Sequence[int]) -> list[str]:
    """Smallest, mean and largest."""
    if not values:
        return ["-"] * 3
    return [str(min(values)), f"{sum(values) / len(values):.1f}", str(max(values))]


def warnings(report: Report) -> list[str]:
    """What a reader must know: layers that failed, matrices that were no targets."""
    lines = [f"kept dense: {name}: {reason}" for name, reason in report.failures.items()]
    untouched = sum(report.untouched.values())
    if untouched:
        share = untouched / report.parameters["dense"]
        example = max(report.untouched, key=lambda name: report.untouched[name])
        lines.append(
            f"untouched: {len(report.untouched)} matrices inside the blocks, {share:.1%} of all "
            f"parameters (the largest: {example})"
        )
    return lines

"""Reports as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_lowrank.report.layers import channels_left, expert_rows
from hf_lowrank.report.schema import Report
from hf_lowrank.report.sections import Evaluation, Recovery, Settings
from hf_lowrank.report.text.embedding_lines import embedding_notes, embedding_rows
from hf_lowrank.report.text.speed_table import (
    speed_columns,
    speed_comparison,
    speed_conditions,
    speed_notes,
    speed_rows,
)
from hf_lowrank.report.training_sections import Training

FOREIGN = ", foreign text"


def format_report(report: Report) -> str:
    """One report as a table of what changed, the ranks by layer type and the seconds."""
    parameters, size = report.parameters, report.bytes
    rows = [
        ["", "dense", "compressed", "kept"],
        ["parameters", f"{parameters.dense:,}", f"{parameters.kept:,}", f"{parameters.share:.2%}"],
        [
            "  in targeted layers",
            f"{parameters.targeted_dense:,}",
            f"{parameters.targeted_kept:,}",
            f"{parameters.targeted_share:.2%}",
        ],
        ["megabytes", f"{size.dense / 1e6:.1f}", f"{size.kept / 1e6:.1f}", f"{size.share:.2%}"],
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
        lines.append(f"predicted by the prices: {predicted(report)}")
    if report.measured_prices:
        factors = sorted(part.factor for part in report.measured_prices)
        said = f"prices of {len(factors)} parts on held-out text over those on calibration text"
        lines.append(f"{said}: {factors[0]:.2f} to {factors[-1]:.2f}")
    for place, recovery in _recoveries(report):
        by = " by LoRA" if recovery.kind == "lora" else ""
        lines.append(
            f"recovery{by}{place}, {recovery.steps} steps: held-out loss "
            f"{recovery.loss_before:.4f} -> {recovery.loss_after:.4f}, {_outcome(recovery)}"
        )
    if report.quantization is not None:
        lines.append(report.quantization.describe())
    lines += [trial.describe() for trial in report.size_trials]
    if report.joint is not None:
        joint, accepted = report.joint, math.nan if not report.held_out else report.held_out.mean
        lines.append(
            f"joint: accepted {joint.method!r} at {accepted:+.4f} on the acceptance set; price "
            f"alone {joint.baseline.mean:+.4f}, keeping {joint.baseline_ratio:.2%}"
        )
    rows += speed_rows(report) + embedding_rows(report)
    lines += speed_notes(report) + embedding_notes(report)
    experts = [align(expert_rows(report)), ""] if report.experts else []
    layers = [align(rank_rows(report)), "", *experts]
    parts = [align(rows), *lines, *_search_lines(report), "", *layers]
    parts.append(
        "seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    )
    return "\n".join(parts + warnings(report))


def evaluations(report: Report) -> dict[str, tuple[Evaluation, str]]:
    """What was measured with its source, by what a row's label ends in: "" and on foreign text."""
    found = {
        "": (report.evaluation, report.data.evaluation),
        FOREIGN: (report.foreign_evaluation, report.data.foreign),
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
        parameters, found = report.parameters, report.evaluation
        rows.append(
            [
                f"{parameters.targeted_share:.4f}",
                f"{parameters.kept:,}",
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
        found, config = report.evaluation, report.config
        before, after = ("-", ["-"] * 3) if found is None else _quality(found)
        kept = f"{report.parameters.targeted_share:.4f}"
        dense, compressed = (f"{n / 1e6:.1f}" for n in (report.bytes.dense, report.bytes.kept))
        words = [word for word in (config.metric, config.rule) if word]
        words += ["channels"] if config.channels else []
        words += ["measured_prices"] if config.measured_prices else []
        if any(kept_steps(report)):
            words.append(f"{sum(kept_steps(report))} steps of recovery")
        if report.stages:
            words.append(f"{len(report.stages)} stages")
        how = ", ".join(words)
        seconds = f"{sum(report.seconds.values()):.1f}"
        rows.append([name, compressed, *after, kept, dense, before, how, seconds])
    return rows


def kept_steps(report: Report) -> list[int]:
    """Steps of training after each cut, 0 where held-out text rejected what they gave."""
    return [found.steps if found.accepted else 0 for _, found in _recoveries(report)]


def _recoveries(report: Report) -> list[tuple[str, Recovery]]:
    """The trainings after the cuts, each with " at" its size where there are stages."""
    if not report.stages:
        return [("", report.recovery)] if report.recovery else []
    stages = report.stages
    return [(f" at {each.param_ratio:g}", each.recovery) for each in stages if each.recovery]


def _outcome(recovery: Recovery) -> str:
    return "kept" if recovery.accepted else "not kept"


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
        ("evaluation texts", {str(report.data.evaluation) for report in reports.values()}),
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


def predicted(report: Report) -> str:
    """The predicted rise of the loss, and its standard error where that is known."""
    error, said = report.predicted_standard_error, report.predicted_loss_difference
    return number(said, "+.4f") + (f" +- {error:.4f}" if error is not None else "")


def describe_run(report: Report) -> str:
    """Goal, metric and rule in a sentence."""
    if report.training is not None:
        return f"{_describe_training(report.training)}; seed {report.seed}."
    config = report.config
    how = f"metric {config.metric}" + (f", rule {config.rule}" if config.rule else "")
    how += ", prices from held-out text" if report.measured_prices else ""
    what = "Ranks, and channels of feed-forwards," if config.channels else "Ranks"
    stages = f", in {len(report.stages)} stages" if report.stages else ""
    said = f"Goal: {_goal(config, report.LOSS_UNIT)}{stages}. {what} by {how}; seed {report.seed}."
    if not any(kept_steps(report)):
        return said
    after = "each cut" if report.stages else "the cut"
    steps = " and ".join(str(count) for count in kept_steps(report))
    return f"{said} After {after} {steps} steps of training towards the dense model."


def _goal(config: Settings, unit: str) -> str:
    if config.param_ratio is not None:
        what = "time" if config.objective == "latency" else "weights"
        return f"at most {config.param_ratio:.1%} of the targeted layers' {what} kept"
    if config.megabytes is not None:
        return f"at most {config.megabytes:g} MB"
    if config.loss_tolerance is not None:
        return f"the smallest model within {config.loss_tolerance} {unit} of the dense one"
    return "a loss tolerance" if config.rank is None else f"rank {config.rank} everywhere"


def _describe_training(training: Training) -> str:
    ratio = training.param_ratio
    goal = (
        f"each raising the loss by at most {training.tolerance:g} nats"
        if ratio is None
        else f"down to {ratio:.1%} of the targeted layers' weights"
    )
    epochs = counted(training.epochs, "epoch")
    selections = counted(training.selections, "selection")
    return (
        f"Trained for {epochs} (learning rate {training.learning_rate:g}) from full rank, with "
        f"{selections} of ranks by rule {training.rule}, {goal}"
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


def _search_lines(report: Report) -> list[str]:
    if not report.probes:
        return []
    found = report.held_out
    mean, error = (0.0, 0.0) if found is None else (found.mean, found.standard_error)
    return [
        "",
        align(probe_rows(report)),
        f"accepted: {mean:+.4f} +- {error:.4f} {report.LOSS_UNIT} on held-out calibration text",
    ]


def probe_rows(report: Report) -> list[list[str]]:
    """The steps of the search for a loss tolerance, with a header."""
    rows = [["probe: param_ratio", "predicted", "measured", "+-", "within"]]
    for probe in report.probes:
        rows.append(
            [
                f"{probe.param_ratio:.4f}",
                number(probe.predicted, "+.4f"),
                number(probe.measured, "+.4f"),
                number(probe.standard_error, ".4f"),
                ("yes" if probe.feasible else "no") + ("" if probe.complete else " (early)"),
            ]
        )
    return rows


def stage_rows(report: Report) -> list[list[str]]:
    """The cuts of a compression in stages and the training after each, with a header."""
    rows = [["kept", "rise predicted for the cut", "steps", "held-out loss", "after training", ""]]
    for stage in report.stages:
        cut = [f"{stage.param_ratio:.1%}", number(stage.predicted_loss_difference, "+.4f")]
        if stage.recovery is None:
            rows.append([*cut, "0", "-", "-", ""])
            continue
        losses = (
            number(stage.recovery.loss_before, ".4f"),
            number(stage.recovery.loss_after, ".4f"),
        )
        rows.append([*cut, str(stage.recovery.steps), *losses, _outcome(stage.recovery)])
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
    if untouched := sum(report.untouched.values()):
        share = untouched / report.parameters.dense
        example = max(report.untouched, key=lambda name: report.untouched[name])
        lines.append(
            f"untouched: {len(report.untouched)} matrices inside the blocks, {share:.1%} of all "
            f"parameters (the largest: {example})"
        )
    return lines

"""`report.html`: one report, or several side by side, as one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from hf_lowrank.report.card.card_parts import sentences, without_folders
from hf_lowrank.report.layers import kept_shares, short_block_names, split_name
from hf_lowrank.report.page.document import (
    bar_cell,
    cell,
    document,
    figure,
    paragraph,
    plain_table,
    section,
    table,
)
from hf_lowrank.report.page.plots import (
    MAX_LINES,
    probes_figure,
    require_matplotlib,
    size_quality_figure,
    spectra_figures,
)
from hf_lowrank.report.schema import Report
from hf_lowrank.report.text.embedding_lines import embedding_notes, embedding_rows
from hf_lowrank.report.text.speed_table import (
    speed_comparison,
    speed_conditions,
    speed_notes,
    speed_rows,
)
from hf_lowrank.report.text.table import (
    comparison_rows,
    describe_run,
    differences,
    evaluations,
    number,
    probe_rows,
    rank_rows,
    stage_rows,
    warnings,
)


def report_page(report: Report) -> str:
    """A report with its figures as HTML.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    name = report.base_model or without_folders(report.model)
    title = f"{name}, compressed to {report.parameters.share:.1%} of its parameters"
    return document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            paragraph(describe_run(report), "lead"),
            section("Before and after", *_before_and_after(report)),
            section("Ranks", *_ranks(report)),
            section("Spectra and where they are cut", *_spectra(report)),
            section("Search for the loss tolerance", *_probes(report)),
            section("Stages", *_stages(report)),
            section("What the models write", *_samples({"compressed": report})),
            section("Settings", *_settings(report)),
        ],
    )


def comparison_page(reports: Mapping[str, Report]) -> str:
    """Several reports side by side, by the name of each run.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    title = f"{len(reports)} compressed models side by side"
    notes = [
        paragraph(f"Not comparable at sight: {each}.", "note") for each in differences(reports)
    ]
    return document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            section("Sizes and quality", plain_table(comparison_rows(reports)), *notes),
            section("Speed", *_speeds(reports)),
            section("Quality by size", _size_quality(reports)),
            section("What the models write", *_samples(reports)),
            *(
                section(f"{name}: ranks", *_ranks(report), *_probes(report), *_stages(report))
                for name, report in reports.items()
            ),
        ],
    )


def _speeds(reports: Mapping[str, Report]) -> list[str]:
    conditions = dict.fromkeys(speed_conditions(each) for each in reports.values() if each.speed)
    if not conditions:
        return []
    notes = [paragraph(f"Timed on {each}.", "note") for each in conditions]
    return [plain_table(speed_comparison(reports)), *notes]


def _before_and_after(report: Report) -> list[str]:
    rows = []
    counted = [
        ("parameters", report.parameters.dense, report.parameters.kept, "{:,}"),
        (
            "in targeted layers",
            report.parameters.targeted_dense,
            report.parameters.targeted_kept,
            "{:,}",
        ),
        ("megabytes", report.bytes.dense / 1e6, report.bytes.kept / 1e6, "{:.1f}"),
    ]
    for name, dense, kept, spec in counted:
        texts = [name, spec.format(dense), spec.format(kept), f"{kept / dense:.1%}"]
        rows.append([*map(cell, texts), bar_cell(kept / dense)])
    parts = []
    bare = cell("", "td", ' class="bar"')
    for what, (found, text) in evaluations(report).items():
        for name, before, after, spec in (
            (f"perplexity{what}", found.perplexity_before, found.perplexity_after, ".2f"),
            (f"loss (nats/token){what}", found.loss_before, found.loss_after, ".4f"),
        ):
            texts = [name, number(before, spec), number(after, spec), ""]
            rows.append([*map(cell, texts), bare])
        rise, error = number(found.loss_difference, "+.4f"), number(found.standard_error, ".4f")
        kind = "foreign text, unlike the calibration's" if what else "evaluation text"
        parts.append(
            paragraph(
                f"The loss differs by {rise} ± {error} nats per token over {found.tokens:,} tokens "
                f"of {kind} ({without_folders(text)})."
            )
        )
    if report.predicted_loss_difference is not None:
        parts.append(
            paragraph(f"The prices predicted {report.predicted_loss_difference:+.4f}.", "note")
        )
    told = [[*texts, ""][:4] for texts in embedding_rows(report)]
    rows += [[*map(cell, texts), bare] for texts in [*told, *speed_rows(report)]]
    if notes := embedding_notes(report):
        parts.append(paragraph(" ".join(sentences(notes)), "note"))
    if report.speed is not None:
        parts.append(paragraph(" ".join(sentences(speed_notes(report))), "note"))
    header = [cell(text, "th") for text in ("", "dense", "compressed", "kept")]
    header.append(cell("", "th", ' class="bar"'))
    return [table(header, rows), *parts, *(paragraph(line, "note") for line in warnings(report))]


def _ranks(report: Report) -> list[str]:
    shares = kept_shares(report)
    blocks: dict[str, dict[str, str]] = {}
    for name in report.ranks:
        block, kind = split_name(name)
        blocks.setdefault(block, {})[kind] = name
    kinds = list(dict.fromkeys(split_name(name)[1] for name in report.ranks))
    labels = short_block_names(blocks)
    rows = []
    for block, layers in blocks.items():
        cells = [cell(labels[block] or "other", "th")]
        for kind in kinds:
            if kind not in layers:
                cells.append("<td></td>")
                continue
            name = layers[kind]
            color = _shade(shares.get(name, 0.0))
            cells.append(cell(_kept(report, name), "td", f' style="{color}"'))
        rows.append(cells)
    header = [cell("", "th"), *(cell(kind, "th", ' class="up"') for kind in kinds)]
    caption = (
        "Rank of each layer, a row for each block; the darker, the more of its weights is kept."
    )
    if report.narrowed:
        caption += " Where two numbers stand, the layer has no rank, but fewer outputs x inputs."
    tables = table(header, rows, "heat") + plain_table(rank_rows(report))
    return [f'<div class="pair">{tables}</div>', paragraph(caption, "note")]


def _kept(report: Report, name: str) -> str:
    """What is left of a layer: a rank, a shape, or all of it."""
    if name in report.narrowed:
        return " x ".join(map(str, report.narrowed[name]))
    rank = report.ranks[name]
    return "dense" if rank is None else str(rank)


def _shade(share: float) -> str:
    """Background from white (nothing kept) to dark (all kept), with text that can be read on it."""
    light, dark = (255, 255, 255), (38, 78, 112)
    share = min(share, 1.0)  # a rank that was asked for can cost more than the matrix
    mixed = [round(a + (b - a) * share) for a, b in zip(light, dark, strict=True)]
    text = "#fff" if share > 0.72 else "#1d2329"
    return f"background:rgb({mixed[0]},{mixed[1]},{mixed[2]});color:{text}"


def _spectra(report: Report) -> list[str]:
    if not report.spectra:
        return []
    drawn = [
        figure(uri, f"Spectra of {kind} with the cut of each layer marked")
        for kind, uri in spectra_figures(report).items()
    ]
    caption = (
        f"What each component costs to drop, up to {MAX_LINES} layers of each type from the first "
        "(light) to the last (dark). A dot is the last component that is kept; lines without a "
        "dot stay dense."
    )
    return [paragraph(caption, "note"), f'<div class="figures">{"".join(drawn)}</div>']


def _probes(report: Report) -> list[str]:
    if not report.probes:
        return []
    drawn = figure(
        probes_figure(report), "Predicted and measured rise of the loss by kept share", kind="wide"
    )
    return [drawn, plain_table(probe_rows(report))]


def _stages(report: Report) -> list[str]:
    if not report.stages:
        return []
    caption = (
        "Losses in nats per token. Each cut starts from the model that the stage before it left; "
        "its predicted rise is over that model."
    )
    return [plain_table(stage_rows(report)), paragraph(caption, "note")]


def _samples(reports: Mapping[str, Report]) -> list[str]:
    """Continuations by prompt: the dense model's once, then each compressed model's."""
    texts: dict[str, dict[str, str]] = {}
    for name, report in reports.items():
        for sample in report.samples:
            found = texts.setdefault(sample.prompt, {"dense": sample.dense})
            if found["dense"] != sample.dense:
                found[f"dense, {name}"] = sample.dense
            found[name] = sample.compressed
    parts = []
    for prompt, written in texts.items():
        boxes = "".join(
            f"<div><h4>{escape(name)}</h4><p>{escape(text.strip())}</p></div>"
            for name, text in written.items()
        )
        parts += [f"<h3>{escape(prompt)} …</h3>", f'<div class="samples">{boxes}</div>']
    note = paragraph("Greedy continuations of the same prompts; nothing is chosen.", "note")
    return [note, *parts] if parts else []


def _settings(report: Report) -> list[str]:
    config = {k: v for k, v in report.config.to_dict().items() if v not in (None, {}, [])}
    groups: dict[str, Mapping[str, object]] = {
        "setting": config | {f"text: {k}": _public(v) for k, v in report.data.to_dict().items()},
        "seconds": {name: f"{value:.1f}" for name, value in report.seconds.items()},
        "version": report.versions,
    }
    tables = [
        plain_table([[heading, ""], *([str(k), str(v)] for k, v in values.items())], "facts")
        for heading, values in groups.items()
        if values
    ]
    return [f'<div class="figures">{"".join(tables)}</div>']


def _public(value: object) -> object:
    return without_folders(value) if isinstance(value, str) else value


def _size_quality(reports: Mapping[str, Report]) -> str:
    curves: dict[tuple[float, float], list[tuple[str, float, float]]] = {}
    for name, report in reports.items():
        found = report.evaluation
        if found is not None and found.perplexity_after and found.perplexity_before:
            dense = (report.bytes.dense / 1e6, found.perplexity_before)
            point = (name, report.bytes.kept / 1e6, found.perplexity_after)
            curves.setdefault(dense, []).append(point)
    if not curves:
        return ""
    caption = "A line joins the models that come from one dense model and were read on one text."
    return figure(
        size_quality_figure(curves), "Perplexity by size in megabytes", caption, kind="wide"
    )

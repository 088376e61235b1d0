"""`report.html`: one report, or several side by side, as one self-contained file.

What stands on a page is put together here as plain data; `page_template.html` says how it looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from hf_lowrank.report.card.card_parts import sentences, without_folders
from hf_lowrank.report.layers import expert_rows, kept_shares, short_block_names, split_name
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
    predicted,
    probe_rows,
    rank_rows,
    stage_rows,
    warnings,
)

# The name of a macro of the template, and its arguments.
Part = tuple[str, dict[str, Any]]


def report_page(report: Report) -> str:
    """A report with its figures as HTML.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    name = report.base_model or without_folders(report.model)
    return _page(
        f"{name}, compressed to {report.parameters.share:.1%} of its parameters",
        {
            "Before and after": _before_and_after(report),
            "Ranks": _ranks(report),
            "Spectra and where they are cut": _spectra(report),
            "Search for the loss tolerance": _probes(report),
            "Stages": _stages(report),
            "What the models write": _samples({"compressed": report}),
            "Settings": _settings(report),
        },
        describe_run(report),
    )


def comparison_page(reports: Mapping[str, Report]) -> str:
    """Several reports side by side, by the name of each run.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    notes = [_text(f"Not comparable at sight: {each}.") for each in differences(reports)]
    sections = {
        "Sizes and quality": [_table(comparison_rows(reports)), *notes],
        "Speed": _speeds(reports),
        "Quality by size": _size_quality(reports),
        "What the models write": _samples(reports),
    }
    for name, report in reports.items():
        sections[f"{name}: ranks"] = [*_ranks(report), *_probes(report), *_stages(report)]
    return _page(f"{len(reports)} compressed models side by side", sections)


def _page(title: str, sections: Mapping[str, Sequence[Part]], lead: str = "") -> str:
    """The whole file; sections without parts are left out, and all text is escaped."""
    source = resources.files("hf_lowrank.report.page").joinpath("page_template.html")
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(source.read_text("utf-8"))
    return template.render(title=title, lead=lead, sections=sections.items()).lstrip()


def _text(text: str) -> Part:
    return "text", {"text": text}


def _table(rows: Sequence[Sequence[Any]], **options: Any) -> Part:
    """A table, the first row its header; a cell is a text, or a text and its style.

    Args:
        rows: The cells.
        **options: `kind`, and `bars`: a share for each row behind the header, drawn at its end.
    """
    return "table", {"rows": rows, **options}


def _speeds(reports: Mapping[str, Report]) -> list[Part]:
    conditions = dict.fromkeys(speed_conditions(each) for each in reports.values() if each.speed)
    if not conditions:
        return []
    return [_table(speed_comparison(reports)), *(_text(f"Timed on {each}.") for each in conditions)]


def _before_and_after(report: Report) -> list[Part]:
    parameters, size = report.parameters, report.bytes
    rows: list[list[str]] = [["", "dense", "compressed", "kept"]]
    bars: list[float | None] = []
    for name, dense, kept, spec in (
        ("parameters", parameters.dense, parameters.kept, "{:,}"),
        ("in targeted layers", parameters.targeted_dense, parameters.targeted_kept, "{:,}"),
        ("megabytes", size.dense / 1e6, size.kept / 1e6, "{:.1f}"),
    ):
        rows.append([name, spec.format(dense), spec.format(kept), f"{kept / dense:.1%}"])
        bars.append(min(kept / dense, 1.0))
    notes = []
    for what, (found, text) in evaluations(report).items():
        for name, before, after, spec in (
            (f"perplexity{what}", found.perplexity_before, found.perplexity_after, ".2f"),
            (f"loss (nats/token){what}", found.loss_before, found.loss_after, ".4f"),
        ):
            rows.append([name, number(before, spec), number(after, spec), ""])
        rise, error = number(found.loss_difference, "+.4f"), number(found.standard_error, ".4f")
        kind = "foreign text, unlike the calibration's" if what else "evaluation text"
        said = (
            f"The loss differs by {rise} ± {error} nats per token over {found.tokens:,} tokens "
            f"of {kind} ({without_folders(text)})."
        )
        notes.append(("text", {"text": said, "kind": ""}))
    if report.predicted_loss_difference is not None:
        notes.append(_text(f"The prices predicted {predicted(report)}."))
    rows += [[*texts, ""][:4] for texts in embedding_rows(report)]
    rows += speed_rows(report)
    if told := embedding_notes(report):
        notes.append(_text(" ".join(sentences(told))))
    if report.speed is not None:
        notes.append(_text(" ".join(sentences(speed_notes(report)))))
    bars += [None] * (len(rows) - 1 - len(bars))
    return [_table(rows, bars=bars), *notes, *map(_text, warnings(report))]


def _ranks(report: Report) -> list[Part]:
    shares = kept_shares(report)
    blocks: dict[str, dict[str, str]] = {}
    for name in report.ranks:
        block, kind = split_name(name)
        blocks.setdefault(block, {})[kind] = name
    kinds = list(dict.fromkeys(split_name(name)[1] for name in report.ranks))
    labels = short_block_names(blocks)
    rows: list[list[Any]] = [["", *kinds]]
    for block, layers in blocks.items():
        row: list[Any] = [labels[block] or "other"]
        for kind in kinds:
            name = layers.get(kind, "")
            row.append((_kept(report, name), _shade(shares.get(name, 0.0))) if name else "")
        rows.append(row)
    caption = (
        "Rank of each layer, a row for each block; the darker, the more of its weights is kept."
    )
    if report.narrowed:
        caption += " Where two numbers stand, the layer has no rank, but fewer outputs x inputs."
    tables = [_table(rows, kind="heat"), _table(rank_rows(report))]
    tables += [_table(expert_rows(report))] if report.experts else []
    return [("group", {"kind": "pair", "parts": tables}), _text(caption)]


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


def _spectra(report: Report) -> list[Part]:
    if not report.spectra:
        return []
    drawn = [
        _figure(uri, f"Spectra of {kind} with the cut of each layer marked")
        for kind, uri in spectra_figures(report).items()
    ]
    caption = (
        f"What each component costs to drop, up to {MAX_LINES} layers of each type from the first "
        "(light) to the last (dark). A dot is the last component that is kept; lines without a "
        "dot stay dense."
    )
    return [_text(caption), ("group", {"kind": "figures", "parts": drawn})]


def _figure(uri: str, description: str, **options: str) -> Part:
    return "figure", {"uri": uri, "description": description, **options}


def _probes(report: Report) -> list[Part]:
    if not report.probes:
        return []
    description = "Predicted and measured rise of the loss by kept share"
    drawn = _figure(probes_figure(report), description, kind="wide")
    return [drawn, _table(probe_rows(report))]


def _stages(report: Report) -> list[Part]:
    if not report.stages:
        return []
    caption = (
        "Losses in nats per token. Each cut starts from the model that the stage before it left; "
        "its predicted rise is over that model."
    )
    return [_table(stage_rows(report)), _text(caption)]


def _samples(reports: Mapping[str, Report]) -> list[Part]:
    """Continuations by prompt: the dense model's once, then each compressed model's."""
    texts: dict[str, dict[str, str]] = {}
    for name, report in reports.items():
        for sample in report.samples:
            found = texts.setdefault(sample.prompt, {"dense": sample.dense})
            if found["dense"] != sample.dense:
                found[f"dense, {name}"] = sample.dense
            found[name] = sample.compressed
    parts: list[Part] = [
        ("samples", {"prompt": prompt, "written": written}) for prompt, written in texts.items()
    ]
    note = _text("Greedy continuations of the same prompts; nothing is chosen.")
    return [note, *parts] if parts else []


def _settings(report: Report) -> list[Part]:
    config = {k: v for k, v in report.config.to_dict().items() if v not in (None, {}, [])}
    groups: dict[str, Mapping[str, object]] = {
        "setting": config | {f"text: {k}": _public(v) for k, v in report.data.to_dict().items()},
        "seconds": {name: f"{value:.1f}" for name, value in report.seconds.items()},
        "version": report.versions,
    }
    tables = [
        _table([[heading, ""], *([str(k), str(v)] for k, v in values.items())], kind="facts")
        for heading, values in groups.items()
        if values
    ]
    return [("group", {"kind": "figures", "parts": tables})]


def _public(value: object) -> object:
    return without_folders(value) if isinstance(value, str) else value


def _size_quality(reports: Mapping[str, Report]) -> list[Part]:
    curves: dict[tuple[float, float], list[tuple[str, float, float]]] = {}
    for name, report in reports.items():
        found = report.evaluation
        if found is not None and found.perplexity_after and found.perplexity_before:
            dense = (report.bytes.dense / 1e6, found.perplexity_before)
            point = (name, report.bytes.kept / 1e6, found.perplexity_after)
            curves.setdefault(dense, []).append(point)
    if not curves:
        return []
    description = "Perplexity by size in megabytes"
    caption = "A line joins the models that come from one dense model and were read on one text."
    drawn = size_quality_figure(curves)
    return [_figure(drawn, description, caption=caption, kind="wide")]

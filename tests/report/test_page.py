"""report.html: one well-formed file that fetches nothing and shows what the report holds."""

import base64
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hf_lowrank import Report
from hf_lowrank.errors import ConfigError
from hf_lowrank.report.page.page import comparison_page, report_page
from hf_lowrank.report.sections import (
    Data,
    LayerSpectrum,
    Recovery,
    Sample,
    Settings,
    Sizes,
    Stage,
)
from tests.report.test_report import probe, report
from tests.scripts import InProcess

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "img", "link", "br"}
SHAPES = {"a.0.up": (40, 20), "a.1.up": (40, 20), "a.0.down": (20, 40), "a.1.down": (20, 40)}


class Page(HTMLParser):
    """A page taken apart; unbalanced tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"] and data.strip():
            self.words.append(data.strip())

    @property
    def figures(self) -> list[ElementTree.Element]:
        """Every drawing, parsed."""
        prefix = "data:image/svg+xml;base64,"
        assert all(link.startswith(prefix) for link in self.links)
        drawn = [base64.b64decode(link.removeprefix(prefix)) for link in self.links]
        return [ElementTree.fromstring(svg) for svg in drawn]


def full_report(**changes: Any) -> Report:
    """A report with everything that a page can show."""
    spectra = {
        name: LayerSpectrum(shape, tuple(2.0 ** -(i + place) for i in range(20)), 0.01)
        for place, (name, shape) in enumerate(SHAPES.items())
    }
    values = {
        "spectra": spectra,
        "config": Settings(metric="kfac", loss_tolerance=0.05),
        "probes": [probe(), probe(param_ratio=0.8, predicted=math.nan, complete=False)],
        "samples": [Sample("Once", " upon a time", " more")],
        "data": Data(evaluation="text.txt"),
    }
    return report(**(values | changes))


def svg_text(figure: ElementTree.Element) -> set[str]:
    return {element.text or "" for element in figure.iter(f"{SVG}text")}


def test_a_page_is_well_formed_and_fetches_nothing():
    text = report_page(full_report())
    page = Page(text)
    assert not {"script", "iframe", "object", "base"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert len(page.figures) == 3
    names = dict(page.attributes)
    assert ("name", "viewport") in page.attributes
    assert names["lang"] == "en"


def test_a_page_shows_what_the_report_holds():
    words = Page(report_page(full_report())).words
    for expected in (
        "tiny, compressed to 75.0% of its parameters",
        "1,000,000",
        "750,000",
        "10.50",
        "12.25",
        "+0.0420",
        "Once …",
        "upon a time",
        "more",
        "text.txt",
    ):
        assert any(expected in word for word in words), expected


def test_stages_are_a_table_of_cuts_and_training():
    stages = [
        Stage(0.75, 0.0625, Recovery(4.5, 4.25, True, 20)),
        Stage(0.5, None, Recovery(4.75, 4.875, False, 40)),
    ]
    for page in (report_page, lambda each: comparison_page({"one": each, "two": full_report()})):
        words = Page(page(full_report(stages=stages))).words
        start = words.index("after training") + 1
        assert words[start : start + 6] == ["75.0%", "+0.0625", "20", "4.5000", "4.2500", "kept"]
        assert words[start + 6 : start + 12] == ["50.0%", "-", "40", "4.7500", "4.8750", "not kept"]
    assert "rise predicted for the cut" not in report_page(full_report())


def test_ranks_form_a_table_of_blocks_by_types_darker_where_more_is_kept():
    text = report_page(full_report())
    cells = {
        line.split(">")[1].split("<")[0]: line
        for line in text.replace("<td", "\n<td").splitlines()
        if line.startswith('<td style="background')
    }
    assert set(cells) == {"3", "8", "5", "dense"}

    def brightness(rank: str) -> int:
        inside = cells[rank].split("rgb(")[1].split(")")[0]
        return sum(int(part) for part in inside.split(","))

    assert brightness("3") > brightness("5") > brightness("8") > brightness("dense")


def test_each_layer_type_has_a_figure_with_a_dot_on_each_layer_that_is_cut():
    cuts = {}
    for figure in Page(report_page(full_report())).figures:
        kind = next((text for text in svg_text(figure) if "price" in text), None)
        marks = [element.get("style") or "" for element in figure.iter(f"{SVG}use")]
        cuts[kind] = sum("fill: #2f5d82" in mark for mark in marks)
    assert cuts["up: price (nats)"] == 2
    assert cuts["down: price (nats)"] == 1


def test_a_metric_without_prices_shows_singular_values():
    original = full_report(probes=[])
    original.spectra = {
        name: replace(found, price_scale=None) for name, found in original.spectra.items()
    }
    texts = set().union(*(svg_text(figure) for figure in Page(report_page(original)).figures))
    assert "up: singular value" in texts
    assert not any("price" in text for text in texts)


def test_predicted_and_measured_losses_are_drawn_with_the_tolerance():
    texts = [svg_text(figure) for figure in Page(report_page(full_report())).figures]
    assert any({"predicted", "measured", "tolerance"} <= found for found in texts)


def test_what_is_not_in_the_report_is_not_on_the_page():
    bare = report(evaluation=None, predicted_loss_difference=None)
    words = Page(report_page(bare)).words
    assert "perplexity" not in words
    assert "Spectra and where they are cut" not in words
    assert "Search for the loss tolerance" not in words
    assert "What the models write" not in words


def test_text_from_outside_stays_text():
    attack = "<script>alert(1)</script>\"'&"
    nasty = full_report(
        model=attack,
        samples=[Sample(attack, attack, attack)],
        data=Data(evaluation=attack),
        failures={attack: attack},
        ranks={f"a.0.{attack}": 1} | full_report().ranks,
    )
    for text in (report_page(nasty), comparison_page({attack: nasty, "b": nasty})):
        page = Page(text)
        assert "script" not in page.tags
        assert any(attack in word for word in page.words)


@pytest.mark.parametrize(
    ("flaw", "shown", "shown_signed"), [(math.inf, "inf", "+inf"), (math.nan, "-", "-")]
)
def test_numbers_that_are_none_still_make_a_page(flaw: float, shown: str, shown_signed: str):
    original = full_report(probes=[probe(measured=flaw)])
    original.evaluation = replace(original.evaluation, perplexity_after=flaw)
    page = Page(report_page(original))
    after = page.words.index("perplexity") + 2
    assert page.words[after - 1 : after + 1] == ["10.50", shown]
    measured = page.words.index("+0.0310") + 1
    assert page.words[measured : measured + 2] == [shown_signed, "0.0050"]
    compared = Page(comparison_page({"a": original, "b": full_report()}))
    row = compared.words.index("seconds") + 1
    assert compared.words[row : row + 4] == ["a", "3.1", shown, "+0.1541"]
    for each in (page, compared):
        assert not any("nan" in word.split() for word in each.words)
        assert not any({"nan", "inf"} & svg_text(figure) for figure in each.figures)


def test_without_matplotlib_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib .* pip install 'hf-lowrank\[plots\]'"):
        report_page(full_report())


def test_runs_lie_side_by_side_on_one_size_quality_curve():
    small = full_report(bytes=Sizes(4_000_000, 2_000_000))
    page = Page(comparison_page({"large": full_report(), "small": small}))
    assert {"large", "small"} <= set(page.words)
    curve = next(texts for texts in map(svg_text, page.figures) if "size (MB)" in texts)
    assert {"large", "small", "dense"} <= curve
    assert not any("Not comparable" in word for word in page.words)


def test_runs_that_can_not_be_compared_are_marked():
    other = full_report(model="other", data=Data(evaluation="another.txt"))
    words = Page(comparison_page({"a": full_report(), "b": other})).words
    assert "Not comparable at sight: different dense models (other, tiny)." in words
    assert any("different evaluation texts (another.txt, text.txt)" in word for word in words)


# scripts/compare_reports.py


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess("compare_reports", monkeypatch, capsys)


def test_the_script_prints_a_table_and_writes_a_page(compare: InProcess, tmp_path: Path):
    (tmp_path / "a").mkdir()
    full_report().save(tmp_path / "a" / "report.json")
    full_report(bytes=Sizes(4_000_000, 2_000_000)).save(tmp_path / "b.json")
    done = compare(tmp_path / "a", tmp_path / "b.json", "--output", tmp_path / "out" / "page.html")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[0] for line in lines[1:3]] == ["a", "b.json"]
    assert lines[2][1:] == [
        "2.0", "12.25", "+0.1541", "0.0123", "0.5000", "4.0", "10.50", "kfac", "18.0",
    ]  # fmt: skip
    Page((tmp_path / "out" / "page.html").read_text("utf-8"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["page.html"]


def test_the_script_refuses_what_is_no_report(compare: InProcess, tmp_path: Path):
    full_report().save(tmp_path / "a.json")
    done = compare(tmp_path / "a.json", tmp_path, "--output", tmp_path / "page.html")
    assert done.error == f"{tmp_path / 'report.json'}: can't be read (No such file or directory)."
    assert "named twice" in compare(tmp_path / "a.json", tmp_path / "a.json").error
    assert not (tmp_path / "page.html").exists()

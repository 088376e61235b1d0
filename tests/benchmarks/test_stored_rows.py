"""`benchmark.py show`: tables and pictures of rows that are there, and small SVG files."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.figures import panels_of, save_figure
from benchmarks.small_svg import small_svg
from benchmarks.stored_rows import ShowArguments, show_rows
from benchmarks.system_rows import claim, row_path
from hf_lowrank.errors import ConfigError
from hf_lowrank.report.provenance import write_result
from tests.benchmarks.made_up_rows import made_up_row
from tests.scripts import ROOT


def test_stored_rows_are_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, picture = tmp_path / "rows", tmp_path / "systems.svg"
    claim(folder, {"seed": 0})
    for size in (0.8, 0.6):
        write_result(row_path(folder, "joint", size), made_up_row("joint", size, 0.1))
    show_rows(ShowArguments(str(folder), str(picture)))
    assert "| 0.6 | joint |" in capsys.readouterr().out
    assert ">joint</text>" in picture.read_text("utf-8")


def test_stored_perturbations_are_drawn(tmp_path: Path):
    stored = ROOT / "docs" / "results" / "perturbation.json"
    show_rows(ShowArguments(str(stored), str(tmp_path / "ranges.svg")))
    assert ">param_ratio 0.8, gradient set</text>" in (tmp_path / "ranges.svg").read_text("utf-8")


def test_what_holds_no_such_rows_is_refused(tmp_path: Path):
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    for source in (tmp_path, tmp_path / "other.json", tmp_path / "none"):
        with pytest.raises(ConfigError, match=rf"^{source}: holds no rows of systems \(a folder "):
            show_rows(ShowArguments(str(source)))


def test_a_small_picture_has_the_same_texts_and_shapes(tmp_path: Path):
    figure, [axes] = panels_of(1)
    axes.plot([0.123456, 1, 2], [1, 3.14159, 2], marker="o", label="a line")
    axes.set_title("share 0.123456")
    axes.legend()
    save_figure(figure, tmp_path / "small.svg")
    figure.savefig(tmp_path / "large.svg")
    small, large = ((tmp_path / f"{name}.svg").read_text("utf-8") for name in ("small", "large"))
    assert len(small) < len(large) / 2
    assert ">share 0.123456</text>" in small
    assert ">a line</text>" in small
    svg = "{http://www.w3.org/2000/svg}"
    found = ElementTree.fromstring(small)
    ids = {element.get("id") for element in found.iter()}
    links = [
        use.get("{http://www.w3.org/1999/xlink}href", "#")[1:] for use in found.iter(f"{svg}use")
    ]
    assert len(links) >= 4 + 3  # ticks and markers
    assert set(links) <= ids


def test_styles_stand_once_and_numbers_are_short():
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg"><metadata>m</metadata><g id="g">'
        '<path d="M 1.26 2.04&#10;L 3 4.96 z" style="fill: red"/>'
        '<path d="M 0 0 Q 1 1 2 2 L 3.33 3" style="fill: red"/></g></svg>'
    )
    assert small_svg(text).split("\n") == [
        '<svg xmlns="http://www.w3.org/2000/svg">',
        "<style>.c0{fill: red}</style>",
        '<path d="M 1.3 2 3 5 z" class="c0"/>',
        '<path d="M 0 0 Q 1 1 2 2 L 3.3 3" class="c0"/></svg>',
        "",
    ]

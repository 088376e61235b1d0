"""The picture of all systems: everything in it, no name on top of another."""

import itertools
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks import system_figure
from benchmarks.catalogue import AS_PAPERS_STORE as SYSTEMS
from benchmarks.catalogue import OWN
from benchmarks.named_lines import spread
from benchmarks.system_figure import draw_systems
from hf_lowrank.errors import ConfigError
from tests.benchmarks.made_up_rows import DENSE, failed_row, made_up_row

SIZES = {0.4: 2.0, 0.8: 0.1, 0.6: 0.5}
# Many systems end on nearly the same point.
ALL = [
    made_up_row(system.name, size, rise * (1 + 0.01 * (place % 7)))
    for place, system in enumerate(SYSTEMS)
    for size, rise in SIZES.items()
]


@pytest.fixture
def panels_for(monkeypatch, tmp_path: Path):
    """Draws rows and returns the figure's panels, laid out."""

    def draw(rows):
        kept = []
        monkeypatch.setattr(system_figure, "save_figure", lambda figure, path: kept.append(figure))
        draw_systems(rows, tmp_path / "systems.svg")
        FigureCanvasAgg(kept[0]).draw()
        return kept[0].axes

    return draw


def curves(axes) -> list[tuple[list[float], list[float], str]]:
    """Kept shares, rises and shade of the lines in the panel; leaders and samples are outside."""
    inside = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_color()) for line in inside]


def test_every_system_is_a_line_with_a_name(panels_for):
    again = made_up_row(SYSTEMS[0].compact.name, 0.8, 0.1) | {"form": "compact"}
    panels = panels_for([*ALL, again])
    assert [axes.get_title(loc="left") for axes in panels] == list(DENSE)
    for factor, axes in enumerate(panels, start=1):
        assert axes.get_yscale() == "log"
        assert sorted(text.get_text() for text in axes.texts) == sorted(s.name for s in SYSTEMS)
        drawn = curves(axes)
        assert len(drawn) == len(SYSTEMS)
        first = drawn[0]
        assert first[0] == [0.4, 0.6, 0.8]
        assert first[1] == pytest.approx([factor * SIZES[share] for share in first[0]])
        assert axes.get_xlabel().startswith("kept share of the parameters\n")
        assert "not measured" not in axes.get_xlabel()


def test_names_do_not_overlap_and_stand_in_the_order_of_the_lines(panels_for):
    failed = [failed_row(system.name, 0.2) for system in SYSTEMS[:13]]  # a long caption
    for axes in panels_for(ALL + failed):
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 + 1e-6 for low, high in itertools.pairwise(boxes))
        assert min(box.x0 for box in boxes) > axes.get_window_extent().x1
        figure = axes.figure.bbox
        assert max(box.x1 for box in boxes) <= figure.x1
        assert boxes[0].y0 >= figure.y0
        assert boxes[-1].y1 <= figure.y1
        caption = axes.xaxis.label.get_window_extent()
        assert caption.y0 >= figure.y0 - 1
        ends = {row["name"]: row["in_domain"]["loss_difference"] for row in ALL[1::3]}
        names = sorted(axes.texts, key=lambda text: text.get_position()[1])
        rises = [ends[text.get_text()] for text in names]
        assert rises == sorted(rises)


def test_own_systems_stand_out_and_no_two_lines_look_the_same(panels_for):
    axes = panels_for(ALL)[0]
    own = {system.name for system in SYSTEMS if system.source == OWN}
    assert own == {
        *("kfac+price", "price+channels", "joint"),
        *("kfac+price+measured", "price+channels+measured"),
    }
    assert {t.get_text() for t in axes.texts if t.get_fontweight() == "bold"} == own
    styles = system_figure._styles(ALL)
    looks = {(s["linestyle"], s["marker"], s["linewidth"]) for s in styles.values()}
    assert len(looks) == len(SYSTEMS)
    widths = {name in own: style["linewidth"] for name, style in styles.items()}
    assert widths[True] > 2 * widths[False]
    assert {color for _, _, color in curves(axes)} == {"0", "0.5"}


def test_what_a_log_scale_can_not_show(panels_for):
    rows = [
        made_up_row("svd", 0.4, None),
        made_up_row("svd", 0.8, 0.5),
        made_up_row("fwsvd", 0.4, math.inf),
        made_up_row("joint", 0.8, -0.01),
        made_up_row("joint", 0.4, 0.1),
        made_up_row("asvd", 0.4, math.nan),
        failed_row("haloc", 0.4),
    ]
    axes = panels_for(rows)[0]
    low, high = axes.get_ylim()
    assert (low, high) == pytest.approx((0.1 / 1.25, 0.5 * 1.25))
    drawn = [(share, rise) for shares, rises, _ in curves(axes) for share, rise in
             zip(shares, rises, strict=True)]  # fmt: skip
    assert (0.4, high) in drawn
    assert (0.8, low) in drawn
    assert all(low <= rise <= high for _, rise in drawn)
    arrows = [line.get_marker() for line in axes.get_lines() if line.get_marker() in (10, 11)]
    assert sorted(arrows) == [10, 10, 10, 11]  # svd, fwsvd, asvd up; joint down
    assert "haloc" not in {text.get_text() for text in axes.texts}
    caption = axes.get_xlabel()
    assert caption.endswith("arrows: no rise (down), overflow (up)\nnot measured: haloc 0.4")


def test_one_size_and_no_rise_at_all_can_be_drawn(panels_for):
    axes = panels_for([made_up_row("joint", 0.5, -0.01), made_up_row("svd", 0.5, 0.0)])[0]
    assert axes.get_ylim() == (1e-3, 1.0)
    assert sorted(text.get_text() for text in axes.texts) == ["joint", "svd"]


def test_the_file_and_what_can_not_be_drawn(tmp_path: Path, monkeypatch):
    path = tmp_path / "deep" / "systems.svg"
    draw_systems(ALL[:6], path)
    text = path.read_text("utf-8")
    assert all(text.count(f">{name}</text>") == 2 for name in ("svd", "ijcai2025"))
    with pytest.raises(ConfigError, match="no measured row to draw"):
        draw_systems([failed_row("svd", 0.4)], path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"Pictures need matplotlib: pip install 'hf-lowrank\["):
        draw_systems(ALL[:6], path)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).map(sorted), st.floats(0.001, 0.5))
def test_spread_keeps_the_gap_and_the_order_and_stays_inside(wanted, gap):
    found = spread(wanted, gap)
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    assert len(found) == len(wanted)
    assert -1e-9 <= found[0] <= found[-1] <= 1 + 1e-9
    assert all(high - low >= gap - 1e-9 for low, high in itertools.pairwise(found))
    if all(high - low >= gap for low, high in itertools.pairwise(wanted)):
        assert found == pytest.approx(wanted)


def test_spread_moves_neighbours_apart_around_their_middle():
    assert spread([0.5, 0.5, 0.9], 0.2) == pytest.approx([0.4, 0.6, 0.9])
    assert spread([0.0, 0.0], 0.2) == pytest.approx([0.0, 0.2])
    assert spread([1.0, 1.0], 0.2) == pytest.approx([0.8, 1.0])

"""The picture of a table: every method and task in it, means and deviations where they belong."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks import glue_figure
from benchmarks.glue_figure import draw_sizes
from hf_lowrank.errors import ConfigError
from hf_lowrank.tasks.task_arguments import METHOD_NAMES

METHODS = [name for name in METHOD_NAMES if name != "dense"]


def row(task: str, method: str, size: float | None, seed: int, score: float) -> dict[str, Any]:
    return {
        "task": task, "method": method, "param_ratio": size, "seed": seed,
        "dense_metrics": {"accuracy": 0.80 + 0.02 * seed, "f1": 0.1},
        "metrics": {"accuracy": score, "f1": 0.1},
        "parameters": {"targeted_kept": 30, "targeted_dense": 100},
    }  # fmt: skip


ALL = [
    row(task, name, size, 0, 0.75 + 0.001 * place + 0.1 * size)
    for task in ("mrpc", "sst2")
    for place, name in enumerate(METHODS)
    for size in (0.1, 0.25)
] + [row("mrpc", "dense", None, 0, 0.8)]


@pytest.fixture
def panels_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Draws rows and returns the figure's panels, laid out."""

    def draw(rows):
        kept = []
        monkeypatch.setattr(glue_figure, "save_figure", lambda figure, path: kept.append(figure))
        draw_sizes(rows, tmp_path / "sizes.svg")
        FigureCanvasAgg(kept[0]).draw()
        return kept[0].axes

    return draw


def curves(axes) -> list[tuple[list[float], list[float]]]:
    """Kept shares and scores of the methods' lines in the panel."""
    lines = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines if line.get_marker()
            in list("os^Dv<>*X+")]  # fmt: skip


def test_every_method_has_a_name_and_a_line_in_each_panel(panels_for):
    panels = panels_for([*ALL, row("rte", "svd", 0.25, 0, 0.7)])  # one size is no line
    assert [axes.get_title(loc="left") for axes in panels] == ["mrpc", "sst2"]
    for axes in panels:
        names = sorted(axes.texts, key=lambda text: text.get_position()[1])
        assert {text.get_text() for text in names} == {*METHODS, "dense"}
        boxes = [text.get_window_extent() for text in names]
        assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
        assert max(box.x1 for box in boxes) <= axes.figure.bbox.x1
        assert axes.get_ylabel() == "accuracy, percent"
        found = curves(axes)
        assert len(found) == len(METHODS)
        for place, (shares, scores) in enumerate(found):
            assert shares == pytest.approx([0.1, 0.25], rel=0.1)
            assert scores == pytest.approx([76 + 0.1 * place, 77.5 + 0.1 * place])
        bold = {text.get_text() for text in names if text.get_fontweight() == "bold"}
        assert {"kfac", "joint", "rank-selection-price", "lpaf-kfac"} < bold
        assert not bold & {"dense", "svd", "whitened", "rank-selection", "lpaf"}


def test_seeds_are_a_mean_with_a_bar_and_dense_scores_a_mean_across(panels_for):
    rows = [row("rte", "kfac", 0.5, seed, score) for seed, score in enumerate((0.7, 0.74, 0.78))]
    (axes,) = panels_for([*rows, row("rte", "kfac", 0.25, 0, 0.7), row("rte", "svd", None, 0, 0.6)])
    svd, kfac = curves(axes)
    assert svd == ([pytest.approx(0.3, rel=0.05)], [70.0])  # 22 points below dense: on the floor
    assert kfac[0] == pytest.approx([0.25, 0.5], rel=0.05)
    assert kfac[1] == pytest.approx([70.0, 74.0])
    (bar,) = axes.collections
    assert [y for _, y in bar.get_segments()[0]] == pytest.approx([70.0, 78.0])
    dense = next(text for text in axes.texts if text.get_text() == "dense")
    lines = [line for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]
    assert [list(line.get_ydata()) for line in lines] == [pytest.approx([82.0, 82.0])]
    assert axes.get_ylim()[0] == pytest.approx(70.0)
    assert dense.get_position()[1] > 0.9


def test_the_file_and_what_can_not_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "deep" / "sizes.svg"
    draw_sizes(ALL, path)
    drawn = path.read_text("utf-8")
    assert all(drawn.count(f">{name}</text>") == 2 for name in (*METHODS, "dense"))
    assert all(f">{task}</text>" in drawn for task in ("mrpc", "sst2"))
    with pytest.raises(ConfigError, match="no task with rows of two sizes to draw"):
        draw_sizes([ALL[-1], row("rte", "svd", 0.25, 0, 0.7)], path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="Pictures need matplotlib"):
        draw_sizes(ALL, path)

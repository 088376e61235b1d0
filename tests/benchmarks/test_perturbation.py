"""`benchmark.py perturbation`: its figures, its picture, and what it refuses."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import perturbation, perturbation_figure
from benchmarks.perturbation_figure import draw_ranges, linear_threshold, range_title
from benchmarks.perturbation_range import linear_range, measure_range
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import ConfigError
from tests.compression.analyzed import analyzed
from tests.scripts import InProcess, make_inputs, must_not_happen

TITLES = [f"param_ratio {r}, {s} set" for r in (0.8, 0.5) for s in ("gradient", "held-out")]
SCALES = (0.01, 0.1, 1.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(inputs, tmp_path: Path, monkeypatch, capsys):
    """The command on tiny files; a change to None drops an option."""
    command = InProcess("benchmark", monkeypatch, capsys)
    dropped = ("evaluation", "evaluation_sequences", "html_report", "sample_prompt", "speed")
    places = {name: tmp_path / name for name in ("output", "picture")}

    def start(*words, **changes):
        settings = dict.fromkeys(dropped) | {"foreign_evaluation": None} | places | changes
        return command("perturbation", *inputs.arguments(**settings), *words)

    return start


def windows(inputs, part: slice, count: int) -> torch.Tensor:
    """Windows of 32 tokens spread evenly over quarters of the text, without the library's code."""
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    tokens = torch.tensor(tokenizer(inputs.calibration.read_text("utf-8"))["input_ids"])
    quarter = len(tokens) // 4
    tokens = tokens[part.start * quarter : part.stop * quarter]
    stride = (len(tokens) - 32) // (count - 1)
    return torch.stack([tokens[i * stride :][:32] for i in range(count)])


def loss(model, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens).logits[:, :-1].mT, tokens[:, 1:])


def test_the_json_holds_what_is_measured_by_hand(run, inputs, tmp_path: Path):
    done = run("--param_ratio", 0.8, 0.5, "--scales", *SCALES)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "output").read_text("utf-8"))
    assert result["arguments"]["dtype"] == "float32"
    rows = result["ranges"]
    assert [range_title(row) for row in rows] == TITLES

    model = AutoModelForCausalLM.from_pretrained(inputs.model)
    sets = {
        "gradient": windows(inputs, slice(0, 3), 16),
        "held_out": windows(inputs, slice(3, 4), 8),
    }
    batches = {name: [{"input_ids": t} for t in ids.split(4)] for name, ids in sets.items()}
    config = LowRankConfig(param_ratio=0.8)
    analysis = analyzed(model, config, batches["gradient"], with_gradients=True)
    loss(model, sets["gradient"]).backward()
    for row in rows:
        plan = analysis.plan_for_ratio(row["param_ratio"])
        points = measure_range(model, analysis, plan, batches[row["set"]], scales=SCALES)
        assert len(row["points"]) == len(points)
        for found, point in zip(row["points"], points, strict=True):
            assert found == pytest.approx(asdict(point), rel=1e-3, abs=1e-6)
        assert row["kept"] == plan.param_ratio <= row["param_ratio"]
        last = row["points"][-1]
        assert row["predicted_rise"] == pytest.approx(last["second_order"] - last["first_order"])
        assert row["linear_range"] == pytest.approx(linear_range(points), rel=1e-5)
        assert row["linear_scale"] == pytest.approx(row["linear_range"] / last["noise"], rel=1e-5)
        # At t = 1 the layers are those of the truncation: by hand, with the model's own loss.
        first, noise, size = 0.0, 0.0, 0.0
        with torch.no_grad():
            before = loss(model, sets[row["set"]])
            dense = {n: model.get_submodule(n).weight.clone() for n in analysis.spectra}
            for name, rank in plan.ranks.items():
                if rank is not None:
                    layer, factors = model.get_submodule(name), analysis.factors[name]
                    truncated = factors.left[:, :rank] @ factors.right[:rank]
                    first += float((layer.weight.grad * (truncated - layer.weight)).sum())
                    noise += float((truncated - layer.weight).square().sum())
                    size += float(layer.weight.square().sum())
                    layer.weight.copy_(truncated)
            after = loss(model, sets[row["set"]])
            for name, weight in dense.items():
                model.get_submodule(name).weight.copy_(weight)
        assert last["measured"] == pytest.approx(float(after - before), rel=1e-3)
        assert last["first_order"] == pytest.approx(first, rel=1e-3)
        assert last["noise"] == pytest.approx(math.sqrt(noise / size), rel=1e-4)
    assert rows[0]["points"][-1]["measured"] != rows[1]["points"][-1]["measured"]
    assert rows[0]["points"][-1]["noise"] < rows[2]["points"][-1]["noise"]


def test_tables_and_picture_have_every_size_and_set(run, tmp_path: Path):
    done = run("--param_ratio", 0.8, 0.5)
    assert done.code == 0, done.err
    assert [line[3:] for line in done.out.splitlines() if line.startswith("## ")] == TITLES
    assert done.out.count("| t | weight noise |") == len(TITLES)
    rows = json.loads((tmp_path / "output").read_text("utf-8"))["ranges"]
    assert [p["scale"] for p in rows[0]["points"]] == [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    assert 0 < rows[0]["linear_scale"] < 1
    sentence = (
        f"The first order holds up to weight noise {rows[0]['linear_range']:.2e}, "
        f"{rows[0]['linear_scale']:g} of the way to the truncation."
    )
    assert sentence in done.out
    drawn = (tmp_path / "picture").read_text("utf-8")
    assert all(f">{title}</text>" in drawn for title in TITLES)
    assert f">first order holds to {rows[0]['linear_range']:.2g}</text>" in drawn


def test_without_matplotlib_the_figures_are_kept(run, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run()
    assert done.code == 0, done.err
    assert f"{tmp_path / 'picture'} is left out: Pictures need matplotlib: pip" in done.out
    assert len(json.loads((tmp_path / "output").read_text("utf-8"))["ranges"]) == 2
    assert not (tmp_path / "picture").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--param_ratio", 0.8, 0), "must lie in (0, 1], got 0.0."),
        (("--scales", 0.1, 0), "scales must be numbers > 0, got 0.0."),
        (("--scales", "nan"), "scales must be numbers > 0, got nan."),
        (("--dtype", "int8"), "dtype must be one of auto, float32, bfloat16, float16;"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_loaded(run, words, message, monkeypatch):
    loaded = must_not_happen("the model was loaded")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    assert message in run(*words).error


def test_bad_texts_are_refused_before_any_long_work(run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(perturbation, "analyze", must_not_happen("analyze was called"))
    repeated = tmp_path / "repeated.txt"
    repeated.write_text("w01 w02 w03 " * 700, encoding="utf-8")
    error = run(calibration=repeated).error
    assert "of the held_out set" in error
    assert error.endswith("the gradient, held_out sets must not overlap.")
    assert "512 tokens are there for held_out" in run(held_out_sequences=17).error
    assert "held_out sequences must be at least 1" in run(held_out_sequences=0).error
    assert not (tmp_path / "output").exists()


def test_a_size_that_cuts_nothing_is_refused_before_any_is_measured(run, monkeypatch):
    monkeypatch.setattr(perturbation, "measure_range", must_not_happen("it was measured"))
    error = run("--param_ratio", 0.8, 1).error
    assert error.startswith("param_ratio 1.0 leaves every layer dense, so there is no noise")


def made_up(first: float = -0.2, bend: float = 0.5, reached: float = 0.02, **changes):
    """A row whose measured rise is the second order."""
    points = []
    for t in (0.01, 0.1, 1.0):
        second = t * first + t**2 * bend
        points.append(
            {"scale": t, "noise": 0.2 * t, "measured": second, "standard_error": 0.01 * t,
             "first_order": t * first, "second_order": second}
        )  # fmt: skip
    return {"param_ratio": 0.8, "set": "held_out", "points": points, "linear_range": reached,
            "linear_scale": 5 * reached} | changes  # fmt: skip


@pytest.fixture
def panels_for(monkeypatch, tmp_path: Path):
    """Draws rows and returns the figure's panels, laid out."""

    def draw(rows):
        kept = []
        monkeypatch.setattr(
            perturbation_figure, "save_figure", lambda figure, path: kept.append(figure)
        )
        draw_ranges(rows, tmp_path / "ranges.svg")
        FigureCanvasAgg(kept[0]).draw()
        return [axes for axes in kept[0].axes if axes.axison]

    return draw


def test_points_and_curves_are_where_the_row_has_them(panels_for):
    rows = [made_up(), made_up(first=0.4, set="gradient"), made_up(), made_up(reached=0.0)]
    panels = panels_for(rows)
    assert len(panels) == 4
    for axes, row in zip(panels, rows, strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "symlog")
        assert axes.get_ylim() == panels[0].get_ylim()
        lines = {
            line.get_linestyle(): line for line in axes.get_lines() if len(line.get_xdata()) > 9
        }
        for style, key in (("--", "first_order"), ("-", "second_order")):
            x, y = lines[style].get_data()
            assert (x[0], y[0]) == pytest.approx((0.002, row["points"][0][key]))
            assert (x[45], y[45]) == pytest.approx((0.02, row["points"][1][key]))
            assert (x[-1], y[-1]) == pytest.approx((0.2, row["points"][2][key]))
        [bars] = axes.containers
        assert list(bars.lines[0].get_ydata()) == [p["measured"] for p in row["points"]]
        low, high = bars.lines[2][0].get_segments()[-1][:, 1]
        assert (high - low) / 2 == pytest.approx(0.01)
        marks = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in marks] == ([0.02] if row["linear_range"] else [])
    words = [[text.get_text() for text in axes.texts] for axes in panels]
    assert words == [["first order holds to 0.02"]] * 3 + [["first order holds at no point"]]


def test_one_point_without_a_standard_error_can_be_drawn(panels_for):
    row = made_up()
    row["points"] = [row["points"][-1] | {"standard_error": math.inf}]
    (axes,) = panels_for([row])
    assert [list(bars.lines[0].get_ydata()) for bars in axes.containers] == [[0.3]]


def test_the_axis_is_linear_below_the_smallest_prediction_or_three_decades():
    assert linear_threshold([made_up()]) == pytest.approx(1e-3)  # 0.002 is the smallest
    assert linear_threshold([made_up(), made_up(first=1e-9, bend=3.0)]) == pytest.approx(1e-3)
    assert linear_threshold([made_up(first=0.0, bend=0.0)]) == 1.0


def test_no_range_is_one_sentence(tmp_path: Path):
    with pytest.raises(ConfigError, match="no range to draw"):
        draw_ranges([], tmp_path / "ranges.svg")

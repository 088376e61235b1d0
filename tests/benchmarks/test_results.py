"""The tables of docs/results.md and README hold what the JSON files hold that commands wrote."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import system_rows
from benchmarks import table as task_rows
from benchmarks.architecture_table import format_page
from benchmarks.embeddings import format_embeddings
from benchmarks.experts import format_experts
from benchmarks.form_speed import format_speeds
from benchmarks.frontier_table import format_frontier
from benchmarks.recipe import format_recipes
from benchmarks.vllm_speed import format_rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="rows are not in the source archive")

# Lines of README's table of systems by their names in the results.
SELECTION = {
    "ranks and channels": "price+channels",
    "ranks alone": "kfac+price",
    "SP3": "sp3",
    "LoRAP": "lorap",
    "SVD-LLM": "svd-llm",
}


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def systems(name: str) -> list[dict[str, Any]]:
    return system_rows.read_rows(RESULTS / "systems" / name)


def tables(page: str) -> list[list[list[str]]]:
    """The Markdown tables of a text: rows of cells, the header first."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        found.append([lines[0], *lines[2:]])
    return found


def table(page: str, *header: str) -> list[list[str]]:
    """Rows of the one table whose header starts with these cells."""
    text = (ROOT / page).read_text("utf-8")
    [found] = [each for each in tables(text) if each[0][: len(header)] == list(header)]
    return found


def perplexities(row: dict[str, Any]) -> list[str]:
    return [f"{row[text]['perplexity_after']:.4g}" for text in ("in_domain", "out_of_domain")]


def system_cells(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Perplexity at 0.8, 0.6 and 0.4 on both texts, and the seconds at 0.6."""
    by_size = {row["param_ratio"]: row for row in rows if row["name"] == name}
    found = [perplexities(by_size[size]) for size in (0.8, 0.6, 0.4)]
    seconds = f"{by_size[0.6]['total_seconds']:.0f}"
    return [each[0] for each in found] + [each[1] for each in found] + [seconds]


def test_all_systems_are_in_the_table_with_their_measured_figures():
    rows = systems("48x256")
    _, *shown = table("docs/results.md", "system", "metric")
    assert {name for name, *_ in shown} == {row["name"] for row in rows}
    for name, _metric, _rule, *cells in shown:
        assert cells == system_cells(name, rows), name


def test_systems_measured_on_more_tokens_are_in_a_table_of_their_own():
    rows = systems("128x512")
    _, *shown = table("docs/results.md", "system at 128 x 512")
    assert {name for name, *_ in shown} == {row["name"] for row in rows}
    for name, *cells in shown:
        assert cells == system_cells(name, rows), name


def test_compact_twins_have_their_measured_perplexities():
    rows = {(row["name"], row["param_ratio"]): row for row in systems("48x256-compact")}
    _, *shown = table("docs/results.md", "system", "form")
    assert len(rows) == 2 * len(shown)
    for name, form, *cells in shown:
        full = name + "+compact" * (form == "compact")
        found = [perplexities(rows[full, size]) for size in (0.8, 0.6)]
        assert cells == [each[0] for each in found] + [each[1] for each in found]


def test_embeddings_have_their_measured_figures():
    rows = [json.loads(p.read_text("utf-8")) for p in sorted((RESULTS / "embeddings").iterdir())]
    assert len(rows) == 36
    assert table("docs/results.md", "method", "size") in tables(format_embeddings(rows) + "\n")


def test_readme_selects_from_the_table_of_systems():
    rows = systems("48x256")
    _, *shown = table("README.md", "system", "0.8")
    assert {name for name, *_ in shown} == set(SELECTION)
    for name, *cells in shown:
        on_wikitext, on_wikitext_small, _, on_c4, on_c4_small, *_ = system_cells(
            SELECTION[name], rows
        )
        assert cells == [on_wikitext, on_wikitext_small, on_c4, on_c4_small], name


def test_metrics_and_rules_have_their_measured_perplexities():
    found = {
        (row["metric"], row["rule"], f"{row['param_ratio']:g}"): f"{row['perplexity']:.4g}"
        for row in result("metrics")["rows"]
    }
    [_, _, *sizes], *shown = table("docs/results.md", "metric", "rule")
    assert len(shown) * len(sizes) == len(found)
    for metric, rule, *cells in shown:
        assert cells == [found[metric, rule, size] for size in sizes], (metric, rule)


def glue_cells() -> dict[tuple[str, str], str]:
    rows = task_rows.read_rows(RESULTS / "glue")
    [[_, *columns], *shown] = tables(task_rows.format_table(rows) + "\n")[0]
    return {
        (method, column): cell
        for method, *cells in shown
        for column, cell in zip(columns, cells, strict=True)
    }


def test_encoders_have_their_measured_scores():
    found = glue_cells()
    [_, *columns], *shown = table("docs/results.md", "method", "mrpc 0.25")
    for method, *cells in shown:
        assert cells == [found[method, column] for column in columns], method


def change(mean: float, error: float, digits: int = 4) -> str:
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def test_encoders_without_a_rise_have_their_measured_losses():
    _, *shown = table("docs/results.md", "task", "method", "kept")
    files = {path.stem for path in RESULTS.glob("tolerance0_*.json")}
    assert {f"tolerance0_{task}_{method.strip('`')}" for task, method, *_ in shown} == {
        name for name in files if "smollm2" not in name
    }
    for task, method, *cells in shown:
        found = result(f"tolerance0_{task}_{method.strip('`')}")
        sizes, loss = found["parameters"], found["development_loss"]
        scores = [100 * next(iter(found[name].values())) for name in ("dense_metrics", "metrics")]
        assert cells == [
            f"{100 * sizes['targeted_kept'] / sizes['targeted_dense']:.1f} %",
            change(found["held_out"]["mean"], found["held_out"]["standard_error"]),
            change(loss["difference"], loss["standard_error"]),
            "{:.1f} → {:.1f}".format(*scores),
        ], (task, method)


def test_the_range_of_the_predictions_is_the_measured_one():
    _, *shown = table("docs/results.md", "t", "weight noise")
    sets = {
        r["set"]: r["points"] for r in result("perturbation")["ranges"] if r["param_ratio"] == 0.8
    }
    for cells, on_gradient, held_out in zip(shown, *sets.values(), strict=True):
        assert cells == [
            f"{on_gradient['scale']:g}",
            f"{on_gradient['noise']:.2g}",
            f"{on_gradient['first_order']:+.5f}",
            f"{on_gradient['second_order']:+.5f}",
            *(change(p["measured"], p["standard_error"], 5) for p in (on_gradient, held_out)),
        ]


def test_recovery_has_its_measured_perplexities():
    _, *shown = table("docs/results.md", "cut by", "text")
    files = [("recovery_0.8", "recovery"), ("recovery_lora",), ("recovery_channels",)]
    lines = iter(shown)
    for names in [*files, ("recovery_stages",), ("recovery_compact",)]:
        rows = {row["param_ratio"]: row for name in names for row in result(name)["rows"]}
        for text, label in (("wiki.test.raw", "WikiText-2"), ("c4.utf8", "C4")):
            _, said, *cells = next(lines)
            assert said == label
            for size, cell in zip((0.8, 0.6, 0.4), cells, strict=True):
                assert bool(cell) == (size in rows)
                if cell:
                    before, after = cell.split("→")
                    assert same(after, rows[size]["recovered"][text])
                    # Of stages, what the last cut did tells little.
                    assert not before.strip() or same(before, rows[size]["cut"][text])
    assert next(lines, None) is None


def same(shown: str, measured: float) -> bool:
    """Whether a figure is the measured one in four digits."""
    return float(shown) == float(f"{measured:.4g}")


def test_question_answering_has_its_measured_scores():
    rows = {row["method"]: row for row in task_rows.read_rows(RESULTS / "qa")}
    _, *shown = table("docs/results.md", "method", "F1 after the cut")
    assert {method for method, *_ in shown} == set(rows)
    for method, *cells in shown:
        row = rows[method]
        wanted = [
            f"{100 * row[when][score]:.1f}"
            for score in ("f1", "exact_match")
            for when in ("uncured_metrics", "metrics")
        ]
        assert cells == wanted, method


# Lines of the tables of reliability by their names in the results.
OUTCOMES = {
    "the same model comes back": "ok",
    "refused before any work": "refused",
    "another model comes back, and nothing says so": "differs",
    "an error, a crash or a hang": "failed",
    "the dense model does not come back either": "transformers",
    "can't be tried": "untried",
}
DAMAGES = {
    "values in `config.json`": "mutate_config",
    "values in its part on the compression": "mutate_settings",
    "bytes of `config.json`": "mutate_config_bytes",
    "the index of the shards": "mutate_index",
    "values in a header": "mutate_header",
    "bytes of a header": "mutate_header_bytes",
    "a file cut off, too long or gone": "cut_file",
    "tensors gone, added, cut, reshaped, swapped": "change_tensors",
}


def test_every_class_has_its_measured_outcome():
    found = result("architectures")
    _, *shown = table("docs/results.md", "outcome", "default")
    assert {name: cells for name, *cells in shown} == {
        name: [str(found["counts"][recipe].get(kind, 0)) for recipe in ("default", "plain")]
        for name, kind in OUTCOMES.items()
    }
    assert len(found["rows"]) == found["classes"]
    page = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    assert page == format_page(found["rows"], found["classes"])


def test_damaged_checkpoints_have_their_measured_outcomes():
    found = result("damaged_checkpoints")
    _, *shown, total = table("docs/results.md", "damage", "loaded right")
    assert {name: cells for name, *cells in shown} == {
        name: damage_cells(found["by_kind"][kind]) for name, kind in DAMAGES.items()
    }
    assert total == ["all", *damage_cells(found["outcomes"])]
    assert sum(found["outcomes"].values()) == found["arguments"]["count"]


def damage_cells(counts: dict[str, int]) -> list[str]:
    right, refused = (counts.get(kind, 0) for kind in ("loaded right", "refused"))
    return [f"{n:,}" for n in (right, refused, sum(counts.values()) - right - refused)]


def test_kills_have_their_measured_outcomes():
    rows = result("kills")["rows"]
    _, *shown = table("docs/results.md", "command", "kills")
    cells = [kill_cells([row]) for row in rows]
    assert shown == [
        *([f"`{row['command']}`", *found] for row, found in zip(rows, cells, strict=True)),
        ["all", *kill_cells(rows)],
    ]


def kill_cells(rows: list[dict[str, Any]]) -> list[str]:
    """Sums over rows."""
    names = ("kills", "resumed", "left_something")
    sums = [sum(row[name] for row in rows) for name in names]
    return [str(number) for number in (*sums, sum(len(row["failures"]) for row in rows))]


def test_tables_are_found_with_their_cells():
    text = "a\n\n| x | y |\n| --- | ---: |\n| 1 | |\n\n| z |\n| --- |\n"
    assert tables(text) == [[["x", "y"], ["1", ""]], [["z"]]]


def test_recipes_in_both_forms_have_their_measured_rises():
    rows = [json.loads(path.read_text("utf-8")) for path in sorted((RESULTS / "recipe").iterdir())]
    assert len(rows) >= 5
    assert table("docs/results.md", "calibration", "size", "recipe") in tables(
        format_recipes(rows) + "\n"
    )


def test_cuts_priced_on_held_out_text_have_their_measured_rises():
    rows = [json.loads(path.read_text("utf-8")) for path in sorted((RESULTS / "prices").iterdir())]
    assert len(rows) >= 6
    assert table("docs/results.md", "calibration", "size", "predicted") in tables(
        format_recipes(rows) + "\n"
    )


@pytest.mark.parametrize(
    ("folder", "first", "least"),
    [("frontier", "wiki.test.raw", 15), ("frontier_embeddings", "pearson", 10)],
)
def test_the_frontiers_have_their_measured_rows(folder: str, first: str, least: int):
    rows = [json.loads(path.read_text("utf-8")) for path in (RESULTS / folder).iterdir()]
    assert len(rows) >= least
    header = ("row", "MB", "MB in memory", "bits", first)
    assert table("docs/results.md", *header) in tables(format_frontier(rows) + "\n")


@pytest.mark.parametrize("name", ["vllm_2048", "vllm_demo"])
def test_models_in_vllm_have_their_measured_speeds(name: str):
    [expected] = tables(format_rows(result(name)["rows"]) + "\n")
    assert expected in tables((ROOT / "docs" / "serving.md").read_text("utf-8"))


def test_an_encoder_has_its_measured_accuracy_in_both_forms():
    [head, *shown] = table("docs/results.md", "form", "0.5", "0.25")
    for form, (_, *cells) in zip(("compact", "factors"), shown, strict=True):
        rows = [result(f"glue_forms/mrpc-{size}-{form}") for size in head[1:]]
        assert [row["arguments"]["form"] for row in rows] == [form] * len(cells)
        assert cells == [f"{100 * row['metrics']['accuracy']:.1f}" for row in rows]


def test_stored_forms_have_their_measured_speeds():
    [expected] = tables(format_speeds(result("form_speed")["rows"]) + "\n")
    assert table("docs/results.md", "layer", "size", "tokens") == expected


def test_mixtures_have_their_measured_perplexities():
    found = result("experts")
    [expected] = tables(format_experts(found) + "\n")
    assert table("docs/results.md", "experts are made") == expected
    text = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert f"dense perplexity {found['dense']:.2f}" in text


def test_rounding_of_the_compact_form_is_the_measured_one():
    found = result("form_numerics")
    _, *shown = table("docs/results.md", "type", "perplexity", "of the product")
    assert [cells[0] for cells in shown] == list(found["model"])
    for dtype, *cells in shown:
        model, layers = found["model"][dtype], found["random"][dtype]
        expected = [f"{model[name]:.2f}" for name in ("perplexity", "perplexity_of_product")]
        expected.append(f"{model['largest_logit_difference']:.2g}")
        assert cells == [*expected, f"{layers['compact']:.2g}", f"{layers['factors']:.2g}"]

"""A table fills in what is missing and shows what is there."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.glue_size import GlueSizeArguments, bisect_size, find_smallest_sizes
from benchmarks.table import Grid, format_shares, format_table, read_rows, run_rows
from hf_lowrank.errors import ConfigError
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task


def row(task: str, method: str, ratio: float | None, seed: int, before: float, after: float) -> Any:
    return {
        "task": task, "method": method, "seed": seed, "arguments": {"param_ratio": ratio},
        "uncured_metrics": {"accuracy": before}, "metrics": {"accuracy": after},
    }  # fmt: skip


def test_a_grid_has_the_dense_row_once_for_each_task_and_seed():
    rows = Grid(["mrpc", "rte"], ["dense", "svd"], [0.5, 0.25], [0, 1]).rows(GlueArguments())
    assert len(rows) == 2 * 2 * (1 + 2)
    assert [(r.task, r.param_ratio) for r in rows if r.method == "dense" and r.seed == 1] == [
        ("mrpc", None),
        ("rte", None),
    ]
    assert [r.seed for r in rows] == sorted(r.seed for r in rows)


def test_a_grid_refuses_a_wrong_row():
    with pytest.raises(ConfigError, match="param_ratio"):
        Grid(["mrpc"], ["svd"], [0.5, 1.5], [0]).rows(GlueArguments())


def test_the_table_shows_mean_and_spread(tmp_path: Path):
    for number, found in enumerate(
        [
            row("mrpc", "dense", None, 0, 0.80, 0.82),
            row("mrpc", "svd", 0.25, 0, 0.40, 0.70),
            row("mrpc", "svd", 0.25, 1, 0.42, 0.74),
            row("rte", "svd", 0.5, 0, 0.50, 0.55),
        ]
    ):
        (tmp_path / f"{number}.json").write_text(json.dumps(found))
    lines = format_table(read_rows(tmp_path)).splitlines()
    assert lines[0] == "| method | rte 0.5 | mrpc 0.25 |"
    assert lines[2] == "| dense |  | 80.0 → 82.0 |"
    assert lines[3] == "| svd | 50.0 → 55.0 | 41.0 ± 1.4 → 72.0 ± 2.8 |"


def lpaf_row(seed: int, pruned: float, **changes: Any) -> Any:
    found = row("mrpc", "lpaf", 0.25, seed, 0.60, 0.78)
    return found | {"pruned_metrics": {"accuracy": pruned}, **changes}


def test_pruned_models_and_refused_rows_are_told_apart(tmp_path: Path):
    refused = lpaf_row(1, 0.70, refusal="Not factorized", metrics={"accuracy": 0.70})
    del refused["uncured_metrics"]
    rows = [lpaf_row(0, 0.80), refused]
    for number, found in enumerate(rows):
        found["dense_metrics"] = {"accuracy": 0.8}
        (tmp_path / f"{number}.json").write_text(json.dumps(found))
    read = read_rows(tmp_path)
    assert format_table(read).splitlines()[-1] == (
        "| lpaf | 75.0 ± 7.1 → 60.0 → 78.0 → 1 of 2 refused |"
    )
    assert format_table(read[1:]).splitlines()[-1] == "| lpaf | 70.0 → 1 of 1 refused |"
    assert format_shares(read) == "mrpc 0.25 lpaf: 97.5 % of dense"
    assert format_shares(read[1:]) == ""


def test_rows_of_lpaf_from_before_it_had_a_gate_are_not_taken_for_it(tmp_path: Path):
    older = {"param_ratio": 0.25, "form": "factors"}
    for method in ("lpaf", "svd"):
        text = json.dumps({"arguments": older | {"method": method}})
        (tmp_path / f"mrpc-{method}-0.25-seed0.json").write_text(text)
    assert table._is_done(GlueArguments(method="svd", param_ratio=0.25, form="factors"), tmp_path)
    with pytest.raises(ConfigError, match=r"was run with gate 0\.0, not 0\.95"):
        table._is_done(GlueArguments(method="lpaf", param_ratio=0.25, form="factors"), tmp_path)


def test_dense_scores_come_from_any_row_of_a_seed(tmp_path: Path):
    rows = [row("mrpc", "svd", 0.25, seed, 0.4, 0.7) for seed in (0, 1)]
    for number, found in enumerate(rows):
        found["dense_metrics"] = {"accuracy": 0.8 + 0.02 * number}
        (tmp_path / f"{number}.json").write_text(json.dumps(found))
    lines = format_table(read_rows(tmp_path)).splitlines()
    assert lines[2] == "| dense | 81.0 ± 1.4 |"


def test_shares_of_the_dense_score_and_of_the_time():
    rows = [row("mrpc", "rank-selection", 0.25, seed, 0.4, 0.6) for seed in (0, 1)]
    for found, dense, seconds in zip(rows, (0.5, 1.0), (5.0, 10.0), strict=True):
        found["param_ratio"] = 0.25
        found["dense_metrics"] = {"accuracy": dense}
        found["selections"] = []
        found["seconds"] = {"train": 100.0, "selection": seconds}
    assert format_shares(rows) == (
        "mrpc 0.25 rank-selection: 80.0 % of dense, selections 5.0 %, 10.0 % of the training time"
    )


def test_finished_rows_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = GlueArguments(method="svd", param_ratio=0.5)
    path = tmp_path / "mrpc-svd-0.5-seed0.json"
    path.write_text(json.dumps({"arguments": vars(args)}))

    class NoPool:
        def __init__(self, *args: Any) -> None: ...

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: object) -> None: ...

        def map(self, function: Any, rows: Any) -> list[Any]:
            assert not list(rows)
            return []

        def submit(self, *args: Any) -> Any:
            pytest.fail("a finished row was run again")

    monkeypatch.setattr(table, "ProcessPoolExecutor", NoPool)
    run_rows([args], load_glue_task, tmp_path, 1)
    other = GlueArguments(method="svd", param_ratio=0.5, epochs=1)
    with pytest.raises(ConfigError, match="was run with epochs 3, not 1"):
        run_rows([other], load_glue_task, tmp_path, 1)


def test_bisection_finds_the_smallest_size_that_is_good_enough():
    found, probes = bisect_size(lambda ratio: ratio, 0.3, 0.02, precision=1.01)
    assert 0.3 <= found <= 0.3 * 1.01
    assert all(probe["feasible"] == (probe["param_ratio"] >= 0.3) for probe in probes)


def test_a_size_that_nothing_reaches_is_dense():
    found, probes = bisect_size(lambda ratio: 0.0, 0.5, 0.02)
    assert found == 1.0
    assert not any(probe["feasible"] for probe in probes)


@pytest.mark.parametrize(("cores", "workers", "threads"), [(4, 2, 2), (4, 3, 1), (1, 2, 1)])
def test_rows_share_the_cores_of_the_process(monkeypatch, tmp_path, cores, workers, threads):
    given = []

    class Pool:
        def __init__(self, workers, context, initializer, arguments):
            given.append((workers, *arguments))
            raise KeyboardInterrupt

    monkeypatch.setattr(table.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(table, "ProcessPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        run_rows([], load_glue_task, tmp_path, workers)
    assert given == [(workers, threads)]


def test_only_cuts_are_judged_without_training():
    args = GlueSizeArguments(methods=["svd", "joint", "lpaf"], epochs=0)
    with pytest.raises(ConfigError, match=r"^With epochs 0 .* are svd, .*; got joint, lpaf"):
        find_smallest_sizes(args)

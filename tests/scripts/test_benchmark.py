"""`scripts/benchmark.py`: the table of question answering, and ranks of pruned weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from tests.scripts import InProcess, save_encoder
from tests.scripts.test_run_glue import pairs
from tests.squad import article, write_squad

TINY = ("--dense_epochs", 1, "--epochs", 1, "--batch_size", 8, "--bf16", False)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess("benchmark", monkeypatch, capsys)


class ThisProcess:
    """In place of a pool: runs everything here, and keeps what it was given."""

    done: list[str]

    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: object) -> None: ...

    def map(self, function: Any, rows: Any) -> Any:
        return map(function, rows)

    def submit(self, function: Any, row: Any, *args: Any) -> Any:
        self.done.append(row.method)
        line = function(row, *args)
        return type("Job", (), {"result": lambda self: line})()


def test_the_table_of_question_answering(
    benchmark: InProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    save_encoder(tmp_path / "model")
    data = write_squad(tmp_path / "squad.json", [article(i) for i in range(6)])
    monkeypatch.setattr(table, "ProcessPoolExecutor", ThisProcess)
    monkeypatch.setattr(table, "as_completed", list)
    monkeypatch.setattr(ThisProcess, "done", [], raising=False)
    command = [
        "qa", "--model", tmp_path / "model", "--data_file", data, "--max_length", 32,
        "--doc_stride", 8, "--cache_dir", tmp_path / "cache", "--folder", tmp_path / "rows",
        "--param_ratios", 0.5, *TINY,
    ]  # fmt: skip
    first = benchmark(*command, "--methods", "dense", "svd")
    assert first.code == 0, first.err
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {
        "squad-dense-seed0.json",
        "squad-svd-0.5-seed0.json",
    }
    picture = tmp_path / "ranks.svg"
    again = benchmark(*command, "--methods", "svd", "kfac", "--picture", picture)
    assert ThisProcess.done == ["dense", "svd", "kfac"]
    assert "| method | squad 0.5 |" in again.out
    rows = table.read_rows(tmp_path / "rows")
    assert sorted(row["method"] for row in rows) == ["dense", "kfac", "svd"]
    assert all(next(iter(row["metrics"])) == "f1" for row in rows)
    drawn = picture.read_text("utf-8")
    assert ">squad svd 0.5</text>" in drawn
    assert ">squad kfac 0.5</text>" in drawn
    other = benchmark(*command, "--methods", "svd", "--questions", 16)
    assert "was run with questions 0, not 16" in other.error


def test_ranks_of_pruned_weights(benchmark: InProcess, tmp_path: Path):
    save_encoder(tmp_path / "model")
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "MRPC" / "train.tsv").write_text(pairs(24, 0))
    (tmp_path / "MRPC" / "dev.tsv").write_text(pairs(12, 1))
    done = benchmark(
        "pruned-ranks", "--model", tmp_path / "model", "--data_dir", tmp_path, "--max_length", 32,
        "--cache_dir", tmp_path / "cache", "--final_density", 0.1, "--output",
        tmp_path / "ranks.json", "--picture", tmp_path / "ranks.svg", *TINY,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "ranks.json").read_text("utf-8"))
    assert result["arguments"]["final_density"] == 0.1
    ranks = result["ranks"]
    ways = ["dense", "sensitivity", "movement", "magnitude"]
    assert list(ranks) == ways
    assert [round(found["density"], 2) for found in ranks.values()] == [1.0, 0.1, 0.1, 0.1]
    assert len(ranks["movement"]["layers"]) == 12
    assert ranks["movement"]["layers"] != ranks["magnitude"]["layers"]
    assert ranks["movement"]["matrix_rank"] < ranks["dense"]["matrix_rank"]
    assert all("accuracy" in found["metrics"] for found in ranks.values())
    assert all("accuracy" in found["held_out_metrics"] for found in ranks.values())
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ways
    picture = (tmp_path / "ranks.svg").read_text("utf-8")
    assert all(f">{word}</text>" in picture for word in (*ranks, "query", "output"))


def test_an_unknown_comparison_shows_the_known_ones(benchmark: InProcess):
    done = benchmark("nothing")
    assert done.code == 2
    assert "pruned-ranks" in done.err
    assert "qa" in done.err

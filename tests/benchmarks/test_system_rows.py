"""The folder of rows: whose it is, and that several processes may fill it."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from benchmarks.system_rows import claim, dense_row, read_rows, row_path
from hf_lowrank.errors import ConfigError, StorageError
from hf_lowrank.report.provenance import write_result
from tests.benchmarks.made_up_rows import DENSE, failed_row, made_up_row


def write(folder: Path, row) -> None:
    write_result(row_path(folder, row["name"], row["param_ratio"]), row)


def _fill(folder: Path, names, start, seed: int) -> None:
    start.wait()
    claim(folder, {"model": "a", "seed": seed})
    for name in names:
        write(folder, made_up_row(name, 0.5, 0.1))


def test_two_processes_fill_one_folder(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    halves = (["joint", "svd"], ["asvd", "fwsvd"])
    workers = [context.Process(target=_fill, args=(tmp_path, names, start, 0)) for names in halves]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [row["name"] for row in read_rows(tmp_path)] == ["svd", "fwsvd", "asvd", "joint"]
    assert len(list(tmp_path.iterdir())) == 5  # and no temporary file


@pytest.mark.parametrize("links", [True, False])
def test_who_comes_second_does_not_take_the_folder(tmp_path: Path, monkeypatch, links: bool):
    """Another process claims the folder just after this one found it free."""
    path = tmp_path / "settings.json"
    link = os.link

    def late(source, target):
        write_result(path, {"settings": {"seed": 1}})
        if not links:
            raise PermissionError("no hard links here")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    if links:
        with pytest.raises(ConfigError, match="holds rows of other settings"):
            claim(tmp_path, {"seed": 0})
    else:
        claim(tmp_path, {"seed": 0})
    assert json.loads(path.read_text())["settings"] == {"seed": int(links)}
    assert [each.name for each in tmp_path.iterdir()] == ["settings.json"]


def test_a_claim_holds_for_the_same_settings_only(tmp_path: Path):
    settings = {"model": "a", "texts": ("x", "y"), "seed": 0}
    claim(tmp_path, settings)
    claim(tmp_path, settings)
    with pytest.raises(ConfigError, match=r"holds rows of other settings \(see settings\.json\)"):
        claim(tmp_path, settings | {"seed": 1})


def test_rows_are_read_in_the_order_of_the_catalogue(tmp_path: Path):
    claim(tmp_path, {})
    for name, ratio in (("joint", 0.4), ("svd", 0.4), ("svd", 0.8), ("asvd+kfac", 0.6)):
        write(tmp_path, made_up_row(name, ratio, 0.1))
    write(tmp_path, failed_row("joint", 0.8))
    gone = made_up_row("svd", 0.4, 0.1) | {"name": "renamed-since"}
    write(tmp_path, gone)
    assert [(row["name"], row["param_ratio"]) for row in read_rows(tmp_path)] == [
        ("svd", 0.8), ("svd", 0.4), ("asvd+kfac", 0.6), ("joint", 0.8), ("joint", 0.4),
    ]  # fmt: skip


def test_a_damaged_row_is_named(tmp_path: Path):
    row_path(tmp_path, "svd", 0.4).write_text('{"name": "sv')
    with pytest.raises(StorageError, match=r"svd-0\.4\.json: can't be read as a row \(.*delete it"):
        read_rows(tmp_path)


def test_the_dense_model_is_known_from_any_measured_row():
    rows = [failed_row("svd", 0.8), made_up_row("svd", 0.4, None)]
    dense = dense_row(rows)
    assert dense is not None
    assert (dense["name"], dense["param_ratio"], dense["kept_parameters"]) == ("dense", 1.0, 1000)
    assert {text: dense[text]["loss"] for text in DENSE} == DENSE
    assert dense["out_of_domain"]["perplexity"] == rows[1]["out_of_domain"]["perplexity_before"]
    assert dense_row(rows[:1]) is None

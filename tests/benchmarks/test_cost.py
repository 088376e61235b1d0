"""What a row of a table cost: every sequence counted once, none of the dense training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules import module as torch_module

from benchmarks import table
from benchmarks.cost import counted, counted_everywhere
from benchmarks.row_cost import format_costs
from benchmarks.table import read_rows, run_row
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task
from tests.scripts import save_encoder
from tests.scripts.test_run_glue import pairs, settings
from tests.tiny_models import batches_for, tiny_bert_classifier, tiny_t5

TARGETS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 24 training and 12 development pairs."""
    folder = tmp_path_factory.mktemp("cost")
    save_encoder(folder / "model")
    (folder / "MRPC").mkdir()
    (folder / "MRPC" / "train.tsv").write_text(pairs(24, 0))
    (folder / "MRPC" / "dev.tsv").write_text(pairs(12, 1))
    return folder


@pytest.mark.parametrize("make", [tiny_bert_classifier, tiny_t5])
def test_a_pass_is_counted_once_whatever_the_model_is_made_of(make: Any):
    model, wrapped = make(), torch.nn.Sequential(make())
    batch = batches_for(model, 1)[0]
    size = len(batch["input_ids"])
    with counted(model) as one, counted_everywhere() as every:
        with torch.no_grad():
            model(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
        with pytest.raises((TypeError, ValueError)):
            model()
        model(**batch)
    assert (every.forwards, every.backwards) == (3 * size, 2 * size)
    assert one.backwards == every.backwards
    assert every.seconds > 0
    assert every.peak_mib > 0
    with counted_everywhere() as every:
        model(**batch)
        wrapped[0](**batch)
    assert every.forwards == 2 * size
    assert not torch_module._has_any_global_hook()


def run(place: Path, folder: Path, method: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The task and the report of a row whose cache of models and spectra is `folder`."""
    size = {} if method == "dense" else {"param_ratio": 0.5}
    given = settings(place, method=method, cache_dir=str(folder), **size, **changes)
    args = GlueArguments(**given)  # type: ignore[arg-type]
    return load_glue_task(args), run_row(args, load_glue_task, folder / "rows")


# What is asked once of a model: its own loss on two items, one item of each text that is scored,
# and one batch of eight that shows which layers qualify (with gradients where the metric has them).
CHECKS = {
    "dense": (2, 0),
    "svd": (2 + 1 + 8, 0),
    "kfac": (2 + 1 + 8, 8),
    "rank-selection": (2 + 2 + 1, 0),
    "rank-selection-price": (2 + 2 + 2, 0),
    "lpaf": (2 + 2 + 6 + 8, 0),
    "joint": (2 + 1 + 1 + 8, 8),
}


def expected(method: str, task: Any, report: dict[str, Any]) -> tuple[int, int]:
    """Sequences forward, and those of them with gradients, of one epoch."""
    train, held_out, dev = len(task.train), len(task.held_out), len(task.validation)
    # Loss and score on the development set, score on the held-out set; at the end its loss, too.
    around = 4 * dev + 3 * held_out
    uncured = dev + held_out
    start_and_epoch = 2 * held_out
    if method == "dense":  # without epochs
        return around + uncured, 0
    if method.startswith("rank-selection"):  # no evaluation at the start; two selections
        gradients = train * (3 if method.endswith("price") else 1)
        return around + held_out + gradients, gradients
    if method == "lpaf":  # two steps of 8 while pruning; two of 8 twice through the model
        pruned = uncured + held_out  # and the dense score that it is held against
        return around + pruned + uncured + start_and_epoch + 3 * 16, 3 * 16
    gradients = train * {"svd": 1, "kfac": 2, "joint": 3}[method]
    forwards = around + uncured + start_and_epoch + gradients
    if method == "joint":  # before and after; dense and each candidate
        forwards += 2 * dev + (1 + len(report["joint"]["trials"])) * held_out
    return forwards, gradients


@pytest.mark.parametrize(
    ("method", "decompositions", "changes"),
    [
        ("dense", 0, {"epochs": 0}),
        ("svd", TARGETS, {}),
        ("kfac", TARGETS, {"bf16": True}),
        ("rank-selection", 2 * TARGETS, {}),
        ("rank-selection-price", 2 * TARGETS, {}),
        ("lpaf", TARGETS, {"gate": 0.0}),
        ("joint", None, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_run_is_counted_exactly(
    place: Path, tmp_path: Path, method: str, decompositions: int | None, changes: dict[str, Any]
):
    task, report = run(place, tmp_path, method, **changes)  # trains the dense model, too
    cost = report["cost"]
    forwards, backwards = expected(method, task, report)
    checks = CHECKS[method]
    assert (cost["forwards"], cost["backwards"]) == (forwards + checks[0], backwards + checks[1])
    if decompositions is None:  # every target, and the factors that were corrected
        assert TARGETS <= cost["decompositions"] == report["joint"]["decompositions"]
    else:
        assert cost["decompositions"] == decompositions
    assert "restored" not in cost
    assert cost["seconds"] > sum(report["seconds"].values()) - report["seconds"]["dense"]
    assert cost["peak_mib"] > 0


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_what_is_in_the_cache_costs_no_passes(place: Path, tmp_path: Path):
    _, cold = run(place, tmp_path, "lpaf", gate=0.0)
    shutil.rmtree(tmp_path / "rows")
    _, again = run(place, tmp_path, "lpaf", gate=0.0)
    assert "dense" in again["seconds"]
    assert again["cost"]["restored"] == ["pruned", "factorized", "fine_tuned"]
    assert again["cost"]["backwards"] == 0 < cold["cost"]["backwards"]


def test_rows_with_and_without_a_cost_are_read_and_shown(tmp_path: Path):
    old = {
        "task": "mrpc", "method": "svd", "seed": 0, "arguments": {"param_ratio": 0.25},
        "metrics": {"accuracy": 0.7}, "uncured_metrics": {"accuracy": 0.6},
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(old))
    assert [row.get("cost") for row in read_rows(tmp_path)] == [None]
    assert format_costs(read_rows(tmp_path)) == ""
    cost = {"seconds": 12.34, "forwards": 120, "backwards": 48, "peak_mib": 743.6}
    restored = {"decompositions": 12, "restored": ["pruned"]}
    (tmp_path / "b.json").write_text(json.dumps(old | {"seed": 1, "cost": cost | restored}))
    joint = {"method": "joint", "cost": cost}
    (tmp_path / "c.json").write_text(json.dumps(old | joint))
    rows = read_rows(tmp_path)
    assert rows[1]["cost"] == cost | restored
    assert format_costs(rows).splitlines()[2:] == [
        "| mrpc 0.25 svd, seed 1 | 12.3 | 12 | 120 | 48 | 744 | pruned |",
        "| mrpc 0.25 joint, seed 0 | 12.3 |  | 120 | 48 | 744 |  |",
    ]


def test_the_picture_has_what_the_folder_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for method, size, seed in (("svd", 0.25, 0), ("svd", 0.1, 1), ("kfac", 0.25, 0)):
        row = {
            "task": "mrpc", "method": method, "seed": seed, "arguments": {"param_ratio": size},
            "metrics": {"accuracy": 0.7}, "uncured_metrics": {"accuracy": 0.6},
            "dense_metrics": {"accuracy": 0.8},
        }  # fmt: skip
        (tmp_path / f"{method}-{seed}.json").write_text(json.dumps(row))
    monkeypatch.setattr(table, "run_rows", lambda *args: None)
    picture = tmp_path / "out" / "sizes.svg"
    args = table.TableArguments(
        methods=["svd"], folder=str(tmp_path),
        size_picture=str(picture),
    )  # fmt: skip
    table.fill_table(args, ["mrpc"], GlueArguments(), load_glue_task)
    drawn = picture.read_text("utf-8")
    assert all(f">{name}</text>" in drawn for name in ("mrpc", "svd", "dense", "0.1", "0.25"))
    assert ">kfac</text>" not in drawn

"""`benchmark.py damaged-checkpoints`: a short run, and that each way to go wrong would be seen."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import hf_lowrank
from benchmarks import damaged_checkpoints, mutations
from benchmarks.damaged_checkpoints import (
    Case,
    DamagedArguments,
    make_checkpoints,
    outcomes,
    try_damaged_checkpoints,
    try_to_load,
)
from hf_lowrank.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("good"))


def test_sound_checkpoints_load_right_in_every_stored_form(good: dict[str, Path]):
    assert {name: try_to_load(path).kind for name, path in good.items()} == dict.fromkeys(
        good, "loaded right"
    )
    settings = {
        name: json.loads((path / "config.json").read_text("utf-8"))["quantization_config"]
        for name, path in good.items()
    }
    assert settings["llama narrowed"]["narrowed"]
    assert settings["llama usv"]["form"] == "usv"
    assert settings["bert compact"]["form"] == "compact"
    assert settings["llama compact int8"]["weights"] == "int8"
    assert settings["llama factors int4"]["weights"] == "int4"
    assert (good["llama compact sharded"] / mutations.INDEX).is_file()


def test_a_short_run_is_written_with_its_origin(tmp_path: Path, capsys: Any):
    path = tmp_path / "damaged.json"
    try_damaged_checkpoints(DamagedArguments(count=20, seed=3, output=str(path)))
    found = json.loads(path.read_text("utf-8"))
    assert {"command", "commit", "hardware", "versions"} <= set(found)
    assert sum(found["outcomes"].values()) == 20
    assert set(found["outcomes"]) <= {"loaded right", "refused"}
    assert found["failures"] == []
    assert f"{found['outcomes']['refused']} refused" in capsys.readouterr().out


def test_other_numbers_than_in_the_file_are_seen(good: dict[str, Path]):
    def off_by_one(folder: Path) -> Any:
        model: Any = hf_lowrank.load(folder)
        model.model.norm.weight.data += 1
        return model

    assert try_to_load(good["llama usv"], off_by_one).kind == "loaded wrong"


def test_other_errors_and_large_allocations_are_seen(
    good: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    found = try_to_load(good["llama usv"], lambda folder: {}["no"])
    assert (found.kind, found.detail) == ("other error", "KeyError: 'no'")
    peaks = iter((100.0, 900.0, 900.0))
    monkeypatch.setattr(damaged_checkpoints, "_peak", lambda: next(peaks))
    found = try_to_load(good["llama usv"])
    assert (found.kind, found.detail) == ("too large", "800 MB; ")


def test_a_process_that_dies_or_hangs_is_one_case(
    good: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    """The damage takes the file of weights away; what stands in for `load` ends with it."""

    def load(folder: Path) -> Any:
        if not (folder / "model.safetensors").exists():
            os._exit(7)
        if not (folder / "config.json").exists():
            os.read(reads, 1)
        return hf_lowrank.load(folder)

    reads, _ = os.pipe()
    monkeypatch.setattr(damaged_checkpoints, "SECONDS", 2.0)
    cases = [
        Case(0, "llama usv", lambda folder, chance: (folder / "model.safetensors").unlink()),
        Case(1, "llama usv", lambda folder, chance: (folder / "config.json").unlink()),
        Case(2, "llama usv", lambda folder, chance: None),
    ]
    found = list(outcomes(cases, 0, {"llama usv": good["llama usv"]}, load))
    assert [(each.kind, each.detail) for each in found] == [
        ("died", "exit code 7"),
        ("too slow", "killed"),
        ("loaded right", ""),
    ]


@pytest.mark.parametrize("mutate", mutations.MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_mutation_is_a_change_that_its_seed_repeats(
    good: dict[str, Path], tmp_path: Path, mutate: mutations.Mutation
):
    source, changed = good["llama compact sharded"], 0
    for seed in range(8):
        for name in ("one", "other"):
            shutil.copytree(source, tmp_path / name, dirs_exist_ok=True)
            mutate(tmp_path / name, random.Random(seed))
        files = [
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (tmp_path / "one", tmp_path / "other", source)
        ]
        assert files[0] == files[1]
        changed += files[0] != files[2]
    assert changed >= 6


def test_tensors_that_change_places_differ_in_shape(good: dict[str, Path], tmp_path: Path):
    before = load_file(good["llama usv"] / "model.safetensors")
    folder, swaps = tmp_path / "copy", 0
    for seed in range(30):
        shutil.copytree(good["llama usv"], folder, dirs_exist_ok=True)
        mutations.change_tensors(folder, random.Random(seed))
        after = load_file(folder / "model.safetensors")
        shared = before.keys() & after.keys()
        swaps += sum(after[name].shape != before[name].shape for name in shared) == 2
    assert swaps >= 2


def test_a_run_without_cases_is_refused():
    with pytest.raises(ConfigError, match=r"^count must be an integer >= 1, got 0\.$"):
        try_damaged_checkpoints(DamagedArguments(count=0))

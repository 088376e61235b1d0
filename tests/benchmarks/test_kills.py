"""`benchmark.py kills`: one kill of a command, and that each thing that can be wrong is seen."""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import killed_runs
from benchmarks.killed_runs import Scenario, half_written, leftovers, run, scenarios
from benchmarks.kills import KillsArguments, Trials, kill_runs
from hf_lowrank.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")
SIGKILL = -9


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scenario]]:
    with scenarios(tmp_path_factory.mktemp("kills")) as found:
        yield {scenario.name: scenario for scenario in found}


@pytest.fixture(scope="module")
def finished(commands: dict[str, Scenario]) -> Trials:
    """The command with a cache, run to its end once."""
    trials = Trials(commands["compress_llm.py --cache_dir"], seed=0)
    trials.undisturbed()
    return trials


def test_a_run_can_be_killed_and_started_again(finished: Trials):
    for _ in range(2):
        finished.kill_once()
    row = finished.row()
    assert row["kills"] + row["finished_before"] == 2
    assert row["failures"] == []


def test_the_wait_for_a_run_is_one(commands: dict[str, Scenario]):
    began = time.perf_counter()
    time.sleep(0.02)  # retries of the fake Hub do not wait, all else does
    assert time.perf_counter() - began >= 0.02


def test_a_kill_ends_the_run_before_it_has_written(finished: Trials):
    finished.scenario.clear()
    assert run(finished.scenario, 0.0).code == SIGKILL
    assert not finished.scenario.final.exists()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.safetensors", "the final folder is not whole"),
        ("README.md", "the final folder has other values of README.md"),
    ],
)
def test_a_file_that_breaks_off_is_seen(finished: Trials, name: str, found: str):
    finished.undisturbed()
    path = finished.scenario.final / name
    path.write_bytes(path.read_bytes()[:-9])
    assert half_written(finished.scenario, finished.wanted).startswith(found)


def test_a_cached_file_that_breaks_off_is_seen_and_a_temporary_one_is_not(finished: Trials):
    finished.undisturbed()
    cached = sorted((finished.scenario.folder / "cache").glob("*.pt"))[0]
    temporary = cached.with_name(f"{cached.name}.tmp-1")
    temporary.write_bytes(b"half")
    assert half_written(finished.scenario, finished.wanted) == ""
    assert leftovers(finished.scenario.folder) == [temporary.name]
    cached.write_bytes(b"half")
    assert half_written(finished.scenario, finished.wanted).startswith(
        f"{cached.name} is not whole"
    )


def test_another_rank_in_the_report_is_named_and_what_is_of_the_run_is_not(finished: Trials):
    finished.undisturbed()
    path = finished.scenario.final / "report.json"
    report = json.loads(path.read_text("utf-8"))
    path.write_text(
        json.dumps(report | {"seconds": {"total": 1e9}, "command": "python resumed.py"}), "utf-8"
    )
    assert half_written(finished.scenario, finished.wanted) == ""
    path.write_text(json.dumps(report | {"ranks": {}}), "utf-8")
    assert half_written(finished.scenario, finished.wanted) == (
        "the final folder has other values of ranks"
    )


def test_a_repository_that_differs_from_its_folder_is_seen(commands: dict[str, Scenario]):
    trials = Trials(commands["compress_llm.py --push_to_hub"], seed=0)
    trials.undisturbed()
    scenario = trials.scenario
    assert half_written(scenario, trials.wanted) == ""
    assert scenario.hub is not None
    scenario.hub.repositories[killed_runs.REPOSITORY].commits[-1].pop("config.json")
    assert half_written(scenario, trials.wanted) == (
        "the repository holds another result than the folder"
    )


def test_a_run_that_cannot_be_started_again_is_a_failure(
    finished: Trials, monkeypatch: pytest.MonkeyPatch
):
    trials = Trials(finished.scenario, seed=0)
    trials.undisturbed()
    monkeypatch.setattr(
        trials.scenario, "arguments", [*trials.scenario.arguments, "--rule", "no-such-rule"]
    )
    shutil.rmtree(trials.scenario.final)
    assert trials._start_again().startswith("the next run ended with 2: error: ")


def test_a_count_of_kills_is_written_with_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Trials, "kill_once", lambda self: self.counts.update(["kills"]))
    kill_runs(KillsArguments(count=7, output=str(tmp_path / "kills.json")))
    found = json.loads((tmp_path / "kills.json").read_text("utf-8"))
    assert {"command", "commit", "hardware", "versions"} <= set(found)
    assert (found["kills"], found["failures"]) == (7, 0)
    assert [row["kills"] for row in found["rows"]] == [2, 1, 1, 1, 1, 1]


def test_a_run_that_ends_before_its_kill_is_no_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kinds = itertools.cycle(["kills", "finished_before"])
    monkeypatch.setattr(Trials, "kill_once", lambda self: self.counts.update([next(kinds)]))
    kill_runs(KillsArguments(count=7, output=str(tmp_path / "kills.json")))
    found = json.loads((tmp_path / "kills.json").read_text("utf-8"))
    assert (found["kills"], found["finished_before"]) == (7, 6)


def test_a_run_without_kills_is_refused():
    with pytest.raises(ConfigError, match=r"^count must be an integer >= 1, got 0\.$"):
        kill_runs(KillsArguments(count=0))

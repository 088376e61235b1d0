"""Runs of the scripts on tiny models, in forks that can be killed, and what they leave behind.

A fork has everything imported already, so a run takes a second and a kill can hit any part of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowrank
from hf_lowrank.report.provenance import commit
from tests.fake_hub import FakeHub, acting_as_the_hub, published
from tests.scripts import Inputs, make_inputs, save_encoder, script_module
from tests.scripts.test_run_glue import pairs

REPOSITORY = "ada/small"
_POLL_SECONDS = 0.001
_MOST_POLLS = 300_000  # of a run that is not killed: it hangs
# Of a report: what differs between two runs of one command, or of one that goes on from another.
_OF_THE_RUN = ("seconds", "date", "command")


@dataclass
class Scenario:
    """One command, always in the same folder, which is emptied before a trial.

    Attributes:
        name: What it is called in the result.
        script: Name of the script.
        arguments: Its command line.
        folder: Everything that the run writes.
        final: Where the finished model lies.
        resume: What is added to the command to go on instead of starting again, where it can.
        hub: The Hub that it publishes to.
    """

    name: str
    script: str
    arguments: list[str]
    folder: Path
    final: Path
    resume: list[str] = field(default_factory=list)
    hub: FakeHub | None = None

    def clear(self) -> None:
        """As if nothing had run yet."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.hub is not None:
            self.hub.repositories.clear()
            self.hub.blobs.clear()

    def uploaded(self) -> dict[str, bytes] | None:
        """What a reader of the repository gets; None where nothing is published."""
        repository = self.hub.repositories.get(REPOSITORY) if self.hub else None
        return repository.files if repository and repository.commits else None


@dataclass
class Ending:
    """How a run ended.

    Attributes:
        code: Exit code; -9 after a kill.
        seconds: How long it ran.
        first_write: Seconds until it had written something, or None.
        text: What it printed.
    """

    code: int
    seconds: float
    first_write: float | None
    text: str


@contextmanager
def scenarios(place: Path) -> Iterator[list[Scenario]]:
    """All commands, with a local Hub that stays up."""
    inputs = make_inputs(place / "inputs")
    glue = place / "glue"
    save_encoder(glue / "model")
    (glue / "train.tsv").write_text(pairs(24, 0))
    (glue / "dev.tsv").write_text(pairs(12, 1))
    torch.set_num_threads(1)  # a fork has one thread
    commit()
    with pytest.MonkeyPatch.context() as patch, acting_as_the_hub(patch, place) as hub:
        yield _scenarios(place / "work", inputs, glue, hub)


def _scenarios(folder: Path, inputs: Inputs, glue: Path, hub: FakeHub) -> list[Scenario]:
    out = folder / "out"
    compress = [*inputs.arguments(param_ratio=0.6, output_dir=out), "--overwrite_output_dir"]
    train = {
        **{"model": inputs.model, "train": inputs.calibration, "evaluation": inputs.evaluation},
        **{"train_sequences": 16, "evaluation_sequences": 8, "sequence_length": 32},
        **{"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_strategy": "epoch"},
        **{"target_param_ratio": 0.5, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
        "output_dir": out,
    }
    task = {
        **{"model": glue / "model", "task": "mrpc", "data_dir": glue, "param_ratio": 0.5},
        **{"dense_epochs": 1, "epochs": 1, "batch_size": 8, "max_length": 32, "bf16": False},
        **{"cache_dir": folder / "cache", "output_dir": out},
    }
    cached = [*compress, "--cache_dir", str(folder / "cache")]
    pushed = [*compress, "--push_to_hub", REPOSITORY]
    resume = ["--resume_from_checkpoint", "last"]
    return [
        Scenario("compress_llm.py", "compress_llm", compress, folder, out),
        Scenario("compress_llm.py --cache_dir", "compress_llm", cached, folder, out),
        Scenario("compress_llm.py --stream", "compress_llm", [*compress, "--stream"], folder, out),
        Scenario("train_llm.py", "train_llm", _words(train), folder, out / "final", resume),
        Scenario("run_glue.py", "run_glue", _words(task), folder, out),
        Scenario("compress_llm.py --push_to_hub", "compress_llm", pushed, folder, out, hub=hub),
    ]


def _words(settings: Mapping[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def start(scenario: Scenario, main: Callable[[], None], more: Sequence[str]) -> int:
    """Starts the command in a fork of this process and returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        printed = os.open(
            scenario.folder.with_name("printed"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )
        for stream in (1, 2):
            os.dup2(printed, stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = [f"scripts/{scenario.script}.py", *scenario.arguments, *more]
        main()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(scenario: Scenario, moment: float | None = None, more: Sequence[str] = ()) -> Ending:
    """Runs the command, and kills it with SIGKILL after so many seconds."""
    main = script_module(scenario.script).main
    before = set(scenario.folder.rglob("*"))
    began = time.perf_counter()
    child, first_write = start(scenario, main, more), None
    for polls in count():
        now = time.perf_counter() - began
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if polls > _MOST_POLLS or (moment is not None and now > moment):
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            break
        if moment is None and first_write is None and set(scenario.folder.rglob("*")) - before:
            first_write = now
        time.sleep(_POLL_SECONDS)
    text = scenario.folder.with_name("printed").read_text("utf-8", errors="replace")
    return Ending(os.waitstatus_to_exitcode(status), now, first_write, text)


def result(folder: Path) -> dict[str, Any]:
    """A finished model: the bytes of its files, and its report without what is of the run alone.

    Of the page, which shows the times, that it is whole.
    """
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["report.json"] = without_run(json.loads(files["report.json"]))
    if "report.html" in files:
        files["report.html"] = files["report.html"].rstrip().endswith(b"</html>")
    return files


def without_run(value: Any) -> Any:  # noqa: ANN401
    """A report's content without what is of its run alone."""
    if isinstance(value, dict):
        return {key: without_run(item) for key, item in value.items() if key not in _OF_THE_RUN}
    return [without_run(item) for item in value] if isinstance(value, list) else value


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of files that differ; of the report, its fields."""
    names = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
    if "report.json" in names and "report.json" in found.keys() & wanted.keys():
        names.remove("report.json")
        names += differences(found["report.json"], wanted["report.json"])
    return names


def half_written(scenario: Scenario, wanted: Mapping[str, Any]) -> str:
    """The first thing that a run left under a final name and that is not whole, or nothing."""
    if scenario.final.is_dir() and any(scenario.final.iterdir()):
        try:
            hf_lowrank.load(scenario.final)
            if other := differences(result(scenario.final), wanted):
                return f"the final folder has other values of {', '.join(other)}"
        except (OSError, ValueError, KeyError, hf_lowrank.LowRankError) as error:
            return f"the final folder is not whole: {error}"
    uploaded = scenario.uploaded()
    if uploaded is not None and uploaded != published(scenario.final):
        return "the repository holds another result than the folder"
    for path in (scenario.folder / "cache").rglob("*.pt"):
        if any(part.startswith(".") for part in path.relative_to(scenario.folder).parts):
            continue
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # a file that breaks off can raise anything
            return f"{path.name} is not whole: {error}"
    return ""


def leftovers(folder: Path) -> list[str]:
    """Temporary names that are still there."""
    found = (path for path in folder.rglob("*") if ".tmp-" in path.name or ".old-" in path.name)
    return sorted(path.name for path in found)

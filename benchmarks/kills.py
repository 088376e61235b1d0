"""`kill -9` at random moments of the scripts: nothing half-done, and the same result afterwards."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from hf_lowrank.config import option
from hf_lowrank.report.provenance import write_result
from hf_lowrank.value_checks import check_count

if TYPE_CHECKING:
    from benchmarks.killed_runs import Scenario

# The folder that the finished run made is refused, not silently made again.
_EXISTS = "exists and is not empty"


@dataclass
class KillsArguments:
    """Arguments of the trial by kills."""

    count: int = option(100, "Kills; the commands take turns.")
    only: str = option("", "Only the commands whose names hold this.")
    seed: int = option(0, "Seed of the moments.")
    output: str = option("outputs/kills.json", "JSON file of the result.")

    def check(self) -> None:
        """Refuses what leaves nothing to try.

        Raises:
            ConfigError: The count is below 1.
        """
        check_count("count", self.count)


def kill_runs(args: KillsArguments) -> None:
    """Writes, for each command, how often it was killed and what was wrong afterwards."""
    args.check()
    from benchmarks.killed_runs import scenarios  # brings pytest, which only this needs

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place, scenarios(Path(place)) as found:
        trials = [Trials(each, args.seed) for each in found if args.only in each.name]
        for trial in cycle(trials):
            trial.kill_once()
            if sum(each.counts["kills"] for each in trials) >= args.count:
                break
    rows = [trial.row() for trial in trials]
    for row in rows:
        print(f"{row['command']}: {row['kills']} kills, {len(row['failures'])} failures")
    totals = {name: sum(row[name] for row in rows) for name in ("kills", "finished_before")}
    failures = sum(len(row["failures"]) for row in rows)
    result = {"arguments": vars(args), **totals, "failures": failures, "rows": rows}
    write_result(Path(args.output), result)


class Trials:
    """Kills of one command, each compared with a run of it that nothing disturbed.

    Args:
        scenario: The command.
        seed: Of the moments.
    """

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.chance = random.Random(f"{seed} {scenario.name}")
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.seconds = self.first_write = 0.0
        self.wanted: dict[str, Any] = {}

    def undisturbed(self) -> None:
        """Runs the command to its end, which shows how long it takes and what it makes."""
        from benchmarks.killed_runs import result, run

        self.scenario.clear()
        ending = run(self.scenario)
        if ending.code:
            raise RuntimeError(f"{self.scenario.name}: {ending.text}")
        self.seconds, self.first_write = ending.seconds, ending.first_write or 0.0
        self.wanted = result(self.scenario.final)

    def kill_once(self) -> None:
        """Kills the command at a random moment and starts it again.

        Every other moment lies after the first write, where most can be broken.
        """
        from benchmarks.killed_runs import half_written, leftovers, run

        if not self.wanted:
            self.undisturbed()
        number = self.counts["kills"] + self.counts["finished_before"]
        moment = self.chance.uniform(self.first_write if number % 2 else 0.0, self.seconds)
        self.scenario.clear()
        ending = run(self.scenario, moment)
        if ending.code == 0:
            self.counts["finished_before"] += 1
            return
        self.counts["kills"] += 1
        left = leftovers(self.scenario.folder)
        self.counts["left_something"] += bool(left)
        wrong = half_written(self.scenario, self.wanted) or self._start_again()
        self.counts["left_after_restart"] += bool(leftovers(self.scenario.folder))
        if wrong:
            self.failures.append({"number": number, "moment": moment, "wrong": wrong, "left": left})
            print(self.scenario.name, self.failures[-1], flush=True)

    def _start_again(self) -> str:
        """What is wrong with the run that follows, or nothing."""
        from benchmarks.killed_runs import differences, half_written, result, run

        scenario = self.scenario
        resume = scenario.resume if self.chance.random() < 0.5 else []
        ending = run(scenario, more=resume)
        if resume and ending.code == 2 and "holds no checkpoint" in ending.text:
            ending = run(scenario)
        elif resume and ending.code == 0:
            self.counts["resumed"] += 1
        if ending.code == 2 and _EXISTS in ending.text:
            self.counts["was_finished"] += 1
        elif ending.code:
            return f"the next run ended with {ending.code}: {ending.text[-800:]}"
        if wrong := half_written(scenario, self.wanted):
            return f"after the next run: {wrong}"
        if scenario.hub and scenario.uploaded() is None:
            return "the next run did not publish"
        other = differences(result(scenario.final), self.wanted)
        return f"the next run has other values of {', '.join(other)}" if other else ""

    def row(self) -> dict[str, Any]:
        """Figures of the command."""
        names = ("kills", "finished_before", "was_finished", "resumed")
        counts = {name: self.counts[name] for name in names}
        left = {name: self.counts[name] for name in ("left_something", "left_after_restart")}
        times = {"seconds": self.seconds, "first_write": self.first_write}
        return {"command": self.scenario.name, **counts, **left, **times, "failures": self.failures}

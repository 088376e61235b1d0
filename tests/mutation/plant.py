"""Plants bugs one by one and counts those that the tests find: `make mutants`.

cosmic-ray makes the mutants, in place. Each is tested in a fork of a process that has imported
everything but this package, so that a mutant takes seconds. A stopped run goes on where it was;
the sessions are in outputs/mutants. Mutants come in random order, so those of the first minutes are
a fair sample of all; the share is then followed by its standard error.

python tests/mutation/plant.py                             every group of groups.toml
python tests/mutation/plant.py --minutes 30 ranks channels half an hour each of some
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "outputs" / "mutants"
SKIPPED = ["core/ReplaceBinaryOperator_BitOr_.*"]  # most stand in annotations, which do nothing
HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> None:
    import tomllib  # not in Python 3.10

    groups = tomllib.loads((HERE / "groups.toml").read_text("utf-8"))
    parser = argparse.ArgumentParser(description="Plants bugs and counts those that tests find.")
    parser.add_argument("names", nargs="*", help=f"Groups: {', '.join(groups)}; default all.")
    parser.add_argument("--minutes", type=float, help="Stop a group after these.")
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.names) - set(groups)):
        parser.error(f"no group {', '.join(unknown)}; groups: {', '.join(groups)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in args.names or groups:
        run_group(name, groups[name], args.minutes)


def run_group(name: str, group: dict[str, Any], minutes: float | None) -> None:
    config, session = FOLDER / f"{name}.toml", FOLDER / f"{name}.sqlite"
    address = str(FOLDER / f"{name}.socket")
    command = f"{sys.executable} -S {HERE / 'server.py'} ask {address}"
    settings = {
        "module-path": group["modules"],
        "timeout": group["timeout"],
        "excluded-modules": [],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    lines += [f"test-command = {json.dumps(command)}", "[cosmic-ray.distributor]", 'name = "local"']
    lines += ["[cosmic-ray.filters.operators-filter]", f"exclude-operators = {json.dumps(SKIPPED)}"]
    config.write_text("\n".join(["[cosmic-ray]", *lines]) + "\n", "utf-8")
    tool = str(Path(sys.executable).with_name("cosmic-ray"))
    Path(address).unlink(missing_ok=True)
    served = [sys.executable, str(HERE / "server.py"), "serve", address, *group["tests"]]
    server = subprocess.Popen(served, cwd=ROOT)
    try:
        wait_for(address, server)
        if subprocess.run(command.split(), cwd=ROOT, check=False).returncode:
            raise SystemExit(f"{name}: the tests fail without a mutant: {' '.join(group['tests'])}")
        if not session.exists():
            subprocess.run([tool, "init", str(config), str(session)], cwd=ROOT, check=True)
            skip = tool.replace("cosmic-ray", "cr-filter-operators")
            subprocess.run([skip, str(session), str(config)], cwd=ROOT, check=True)
        plant([tool, "exec", str(config), str(session)], minutes)
        if server.poll() is not None:  # without it every mutant counts as killed
            raise SystemExit(f"{name}: the test server ended; remove {session} and start again")
    finally:
        server.terminate()
    report(name, tool, session)


def plant(command: list[str], minutes: float | None) -> None:
    """Runs cosmic-ray, for some minutes at most; an interrupt has it put the file back."""
    planter = subprocess.Popen(command, cwd=ROOT)
    try:
        if planter.wait(minutes and 60 * minutes):
            raise SystemExit(f"{' '.join(command)} ended with {planter.returncode}")
    except subprocess.TimeoutExpired:
        planter.send_signal(signal.SIGINT)
        planter.wait()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    while not Path(address).exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise SystemExit(f"the test server ended with {server.wait(0.2)}")


def report(name: str, tool: str, session: Path) -> None:
    dump = subprocess.run([tool, "dump", str(session)], capture_output=True, text=True, check=True)
    pairs = [json.loads(line) for line in dump.stdout.splitlines()]
    done = [
        (work["mutations"][0], result)
        for work, result in pairs
        if result and result["test_outcome"]
    ]
    alive = [mutation for mutation, result in done if result["test_outcome"] == "survived"]
    for each in alive:
        place = f"{each['module_path']}:{each['start_pos'][0]}"
        print(f"survived: {place}: {each['operator_name']} {each['occurrence']}")
    share = 1 - len(alive) / max(1, len(done))
    killed = f"{len(done) - len(alive)} of {len(done)} mutants killed, {share:.1%}"
    if left := sum(result is None for _, result in pairs):
        error = (share * (1 - share) / max(1, len(done))) ** 0.5
        killed += f" +- {error:.1%}; {left} are left"
    print(f"{name}: {killed}", flush=True)


if __name__ == "__main__":
    main()

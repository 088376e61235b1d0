"""Where a result comes from: code, command, machine. Nothing is run at import."""

from __future__ import annotations

import functools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from hf_lowrank.files import write_text
from hf_lowrank.report.schema import jsonable
from hf_lowrank.report.sections import Hardware
from hf_lowrank.version import __version__

_VERSIONED = ("torch", "transformers", "accelerate", "datasets", "safetensors")
# Set by git's hooks: they name the repository of the hook, not that of a folder.
_HOOKS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


def provenance() -> dict[str, object]:
    """Command, commit, date, hardware and versions of this process, for a JSON of results."""
    return {
        "command": command_line(),
        "commit": commit(),
        "date": today(),
        "hardware": asdict(hardware()),
        "versions": versions(),
    }


def write_result(path: Path, result: Mapping[str, object]) -> None:
    """Writes a result with its provenance as JSON, under a temporary name first."""
    write_text(path, json.dumps(jsonable(provenance() | dict(result)), indent=2) + "\n")


def command_line() -> str:
    """The command of this process, quoted so that a shell reads it again."""
    return f"python {shlex.join(sys.argv)}"


def today() -> str:
    """The day in UTC, year-month-day."""
    return datetime.now(timezone.utc).date().isoformat()


@functools.cache
def commit() -> str | None:
    """The commit of hf_lowrank's own checkout, see `checkout_commit`.

    Read once, at the first call: the working tree may change while a run goes on.
    """
    return checkout_commit(Path(__file__))


def checkout_commit(file: Path) -> str | None:
    """The commit that a file of a git repository is from, with "-dirty" if anything was changed.

    None where the repository around the file does not hold it, as around a virtual environment,
    and where there is no repository or no git.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file.parent, "describe", "--always", "--dirty", "--exclude=*") or None


def _git(folder: Path, *command: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if name not in _HOOKS}
    try:
        found = subprocess.run(
            ["git", *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version(), "hf-lowrank": __version__}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> Hardware:
    """What this process runs on; an accelerator only if it has been used."""
    is_used = torch.cuda.is_initialized()
    return Hardware(
        processor=processor_name(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        accelerator=torch.cuda.get_device_name() if is_used else None,
    )


def processor_name() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n")
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of what a device is: of the accelerator, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()

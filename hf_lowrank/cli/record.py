"""What a benchmark result must carry: where, when and from which code it came."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.files import write_text
from hf_lowrank.report.hardware import processor_name
from hf_lowrank.report.schema import jsonable, versions


def provenance() -> dict[str, Any]:
    """Command, commit, hardware and versions of this process."""
    return {
        "command": "python " + " ".join(sys.argv),
        "commit": _COMMIT,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        },
        "versions": versions(),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result with its provenance as JSON, under a temporary name first."""
    write_text(path, json.dumps(jsonable(provenance() | result), indent=2) + "\n")


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


# Read once, when the code is: the working tree may change while a benchmark runs.
_COMMIT = _commit()

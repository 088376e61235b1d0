"""What runs the engines themselves: only `make test-exports`, in environments that have them."""

import json
import os
from pathlib import Path

import pytest

from hf_lowrank.cli.export_command import ExportArguments, export

# Where tests/serving/exports/checkpoints.py has written; unset in `make test`.
CHECKPOINTS = os.environ.get("EXPORT_CHECKPOINTS", "")
collect_ignore_glob = [] if CHECKPOINTS else ["test_*.py"]


@pytest.fixture(scope="session")
def checkpoints():
    return Path(CHECKPOINTS)


@pytest.fixture
def exported(checkpoints, tmp_path):
    """Exports a checkpoint in fp32: (folder, rows with prompts and tokens)."""

    def run(name, to):
        folder = tmp_path / name
        export(
            ExportArguments(
                model=str(checkpoints / name), to=to, output_dir=str(folder), dtype="float32"
            )
        )
        rows = checkpoints / name / "expected.json"
        return folder, json.loads(rows.read_text()) if rows.exists() else None

    return run

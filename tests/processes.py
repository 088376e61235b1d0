"""Scripts run by several processes on the CPU, as `accelerate launch` starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import ROOT

needs_gloo = pytest.mark.skipif(sys.platform != "linux", reason="needs gloo on loopback")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_together(script: Path, processes: int, *arguments: object) -> None:
    """Runs a script to its end in processes that know of each other; one alone knows of none."""
    shared = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    port = str(free_port())
    running = []
    for rank in range(processes):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
        }
        running.append(
            subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, **shared, **(place if processes > 1 else {})},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    try:
        errors = [process.communicate(timeout=180)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(
        error[-2000:] for error in errors
    )

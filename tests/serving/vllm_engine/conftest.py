"""What runs vLLM itself: only `make test-vllm`, in an environment that has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# Where tests/serving/vllm_engine/checkpoints.py has written; unset in `make test`.
CHECKPOINTS = os.environ.get("VLLM_CHECKPOINTS", "")
collect_ignore_glob = [] if CHECKPOINTS else ["test_*.py"]
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def environment(**changes):
    return {**os.environ, **QUIET, **changes}


@pytest.fixture(scope="session")
def checkpoints():
    return Path(CHECKPOINTS)


@pytest.fixture(scope="session")
def write():
    """Has vLLM write with checkpoints, one engine after the other in one process of its own."""

    def write(folders, options=None, **changes):
        asked = {"folders": [str(folder) for folder in folders], "options": options or {}}
        done = subprocess.run(
            [sys.executable, HERE / "engine.py"],
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            env=environment(**changes),
            check=True,
        )
        return {Path(name).name: rows for name, rows in json.loads(done.stdout).items()}

    return write

"""The OpenAI API on the loopback: 16 requests at once, every answer whole and the right one."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.vllm_engine.checkpoints import EXPECTED
from tests.serving.vllm_engine.conftest import environment

REQUESTS = 16
SECONDS_TO_START = 600


@pytest.fixture(scope="module", params=["llama_compact", "demo"])
def server(request, checkpoints, tmp_path_factory):
    """(address, rows with prompts and tokens), of a tiny model and of the demo if it is there."""
    folder = checkpoints / request.param
    if not folder.exists():
        pytest.skip("outputs/demo is missing: `make demo` writes it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--served-model-name", "served", "--enforce-eager", "--max-model-len", "48"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment())
    address = f"http://127.0.0.1:{port}"
    try:
        wait(address, process, log)
        yield address, json.loads((folder / EXPECTED).read_text())
    finally:
        process.terminate()
        process.wait(60)


def wait(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(2)
    raise AssertionError(log.read_text()[-3000:])


def ask(address, row):
    body = {
        "model": "served",
        "prompt": row["prompt"],
        "max_tokens": len(row["tokens"]),
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())["choices"][0]["token_ids"]


def test_requests_at_once_are_all_answered_rightly(server):
    address, rows = server
    asked = [rows[i % len(rows)] for i in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(lambda row: ask(address, row), asked))
    assert answers == [row["tokens"] for row in asked]

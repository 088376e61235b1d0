"""Runs tests in forks of a process that has imported everything but this package.

For plant.py: what stays the same from mutant to mutant (torch, transformers, pytest) is
imported once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

# The tests package may be imported before pytest sees it; failures need no details here.
FLAGS = ("-q", "-x", "--no-header", "-W", "ignore::pytest.PytestAssertRewriteWarning")
OWN = ("hf_lowrank", "tests", "benchmarks")


def ask(address: str) -> int:
    """Has the tests run once; their exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        return connection.recv(1)[0]


def serve(address: str, tests: list[str]) -> None:
    import pytest
    import torch

    sys.path.insert(0, str(Path(__file__).parents[2]))
    pytest.main([*FLAGS, *tests])  # imports what the tests import
    for module in [m for m in sys.modules if m.split(".")[0] in OWN]:
        del sys.modules[module]
    # What `torch.load` may make is known by class, and the classes are about to be others.
    torch.serialization.clear_safe_globals()
    sys.dont_write_bytecode = True
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    while True:
        asker, _ = listener.accept()
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            os._exit(int(pytest.main([*FLAGS, "-p", "no:cacheprovider", *tests])))
        with contextlib.suppress(BrokenPipeError):
            asker.sendall(bytes([wait_or_kill(child, asker)]))
        asker.close()


def wait_or_kill(child: int, asker: socket.socket) -> int:
    """Exit code of the child, which is killed when nobody waits for it any longer."""
    asker.settimeout(0.02)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) & 255
        with contextlib.suppress(TimeoutError):
            if not asker.recv(1):
                os.kill(child, signal.SIGKILL)
                return os.waitpid(child, 0)[1] & 255


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    sys.exit(ask(*arguments) if verb == "ask" else serve(arguments[0], arguments[1:]))

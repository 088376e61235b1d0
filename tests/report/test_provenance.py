"""Where a result comes from: commit, command, machine, versions."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import hf_lowrank
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.report import provenance
from hf_lowrank.report.provenance import checkout_commit, command_line, hardware, versions
from tests.tiny_models import tiny_llama

PACKAGE = Path(hf_lowrank.__file__).parent


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    found = subprocess.run(
        ["git", *who, *command], cwd=folder, check=True, capture_output=True, text=True
    )
    return found.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit, whose virtual environment git ignores."""
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


@pytest.fixture
def checkout(repository: Path) -> Path:
    """A file of a repository that holds it."""
    (repository / "pkg").mkdir()
    file = repository / "pkg" / "code.py"
    file.write_text("x = 1\n")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "second")
    return file


def test_a_package_in_the_virtual_environment_of_a_repository_has_no_commit(repository: Path):
    site = repository / ".venv" / "lib" / "python3" / "site-packages"
    shutil.copytree(PACKAGE, site / "hf_lowrank", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "from hf_lowrank.report import provenance as p; print(p.__file__); print(p.commit());"
        "print(p.versions()['hf-lowrank'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    place = str(site / "hf_lowrank" / "report" / "provenance.py")
    assert done.stdout.splitlines() == [place, "None", hf_lowrank.__version__]


def test_a_checkout_has_its_own_commit_and_says_if_it_was_changed(checkout: Path):
    head = git(checkout.parent, "rev-parse", "--short", "HEAD")
    assert checkout_commit(checkout) == head
    checkout.write_text("x = 2\n")
    assert checkout_commit(checkout) == f"{head}-dirty"


def test_a_file_that_git_does_not_hold_has_no_commit(checkout: Path):
    copy = checkout.with_name("copy.py")
    shutil.copy(checkout, copy)
    assert checkout_commit(copy) is None


def test_the_repository_of_a_hook_is_not_asked(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    expected = checkout_commit(checkout)
    monkeypatch.setenv("GIT_DIR", str(checkout.parent / "elsewhere"))
    assert expected
    assert checkout_commit(checkout) == expected


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert checkout_commit(checkout) is None


def test_importing_runs_nothing_and_the_commit_is_read_once(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "abc\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    fresh = importlib.util.module_from_spec(importlib.util.find_spec(provenance.__name__))
    fresh.__spec__.loader.exec_module(fresh)
    assert calls == []
    assert [fresh.commit(), fresh.commit()] == ["abc", "abc"]
    assert len(calls) == 2


def test_the_command_can_be_given_to_a_shell_again(monkeypatch: pytest.MonkeyPatch):
    words = ["scripts/compress_llm.py", "--model", "my models/it's", "--sample_prompt", 'a "b" $c']
    monkeypatch.setattr(sys, "argv", words)
    assert shlex.split(command_line()) == ["python", *words]


def test_a_run_from_python_has_a_machine_and_no_command(tmp_path: Path):
    report = compress(tiny_llama(), LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)
    assert report.command is None
    assert report.commit == provenance.commit()
    assert report.hardware == hardware()
    assert report.hardware.processor
    assert report.hardware.threads == torch.get_num_threads()
    report.save(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert found["command"] is None
    assert set(found["hardware"]) == {"processor", "cpus", "threads", "accelerator"}
    assert hf_lowrank.Report.load(tmp_path) == report


def test_an_accelerator_is_named_only_if_it_was_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Abacus 9")
    for is_used, name in ((False, None), (True, "Abacus 9")):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda is_used=is_used: is_used)
        assert hardware().accelerator == name


def test_versions_of_what_a_result_depends_on():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["python"].startswith("3.")


def test_versions_know_hf_lowrank_itself_also_where_it_is_not_installed():
    assert versions()["hf-lowrank"] == hf_lowrank.__version__

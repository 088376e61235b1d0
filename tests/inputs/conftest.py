"""A text that several files read, and the Hub out of reach."""

from pathlib import Path

import huggingface_hub
import pytest


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A text of the numbers 0 to 999."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(1000))), encoding="utf-8")
    return str(path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

"""The floors that pyproject.toml claims are the versions that `make test-oldest` installs."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One release of torch is tested, that of constraints.txt.
UNTESTED = {"torch"}


def versions(text: str, operator: str) -> dict[str, str]:
    """Version by package, of the requirements with this operator."""
    return dict(re.findall(rf"([\w-]+){operator}([\d.]+)", text))


def test_the_floors_are_the_versions_of_constraints_oldest():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    required = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    peft = re.search(r"^peft = .*$", text, re.MULTILINE)
    assert required
    assert peft
    floors = versions(required[1] + peft[0], ">=")
    pins = versions((ROOT / "constraints-oldest.txt").read_text("utf-8"), "==")
    assert {"transformers", "accelerate", "huggingface_hub", "peft"} <= pins.keys()
    assert floors.keys() - pins.keys() == UNTESTED
    for name, pin in pins.items():
        assert re.fullmatch(rf"{re.escape(floors[name])}(\.0)*", pin), name

"""vLLM's classes are stubs here; tests/serving/vllm_engine runs the real ones."""

import importlib
import sys

import pytest

from tests.serving.vllm import stubs

OWN = ("hf_lowrank.serving.vllm.vllm_config", "hf_lowrank.serving.vllm.vllm_linear")


@pytest.fixture
def vllm_config(monkeypatch):
    """The plugin's module on top of the stubs, imported anew."""
    for name in OWN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, module in stubs.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    stubs.REGISTERED.clear()
    stubs.reset_run()
    yield importlib.import_module(OWN[0])
    for name in OWN:
        sys.modules.pop(name, None)

"""`Layout`: plain data, read without torch."""

import subprocess
import sys
from pathlib import Path

import hf_lowrank

# The package itself imports torch, so an empty one stands in for it.
WITHOUT = """
import sys, types
sys.modules["torch"] = sys.modules["transformers"] = None
package = types.ModuleType("hf_lowrank")
package.__path__ = [sys.argv[1]]
sys.modules["hf_lowrank"] = package
from hf_lowrank.format.layout import Layout
settings = {"format_version": 1, "ranks": {"a": 3, "b": None}, "narrowed": {"b": [2, 5]},
            "quantized": {"b": {"bits": 4, "block": [1, 5]}},
            "experts": {"c": {"experts": 2, "width": 8}}}
print(Layout.from_settings(settings))
"""


def test_layout_needs_neither_torch_nor_transformers():
    folder = str(Path(hf_lowrank.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, folder], capture_output=True, text=True, check=False
    )
    expected = (
        "Layout(ranks={'a': 3, 'b': None}, narrowed={'b': (2, 5)}, form='factors', "
        "quantized={'b': Precision(bits=4, block=(1, 5))}, "
        "experts={'c': ExpertsLeft(experts=2, width=8)})"
    )
    assert done.stdout.strip() == expected, done.stderr

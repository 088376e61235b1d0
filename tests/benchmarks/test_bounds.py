"""`benchmark.py bounds`: Theorem 1 on random networks, and that a broken bound would be seen."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bounds
from benchmarks.bounds import BoundsArguments, check_bounds, measure_bound
from hf_lowrank.errors import ConfigError


def small(**changes: Any) -> BoundsArguments:
    return BoundsArguments(**({"networks": 3, "depth": 3, "width": 8, "inputs": 5} | changes))


def test_the_bound_holds_and_is_written_with_its_origin(tmp_path: Path, capsys: Any):
    path = tmp_path / "bounds.json"
    check_bounds(small(deltas=[0.2, 0.6], output=str(path)))
    found = json.loads(path.read_text("utf-8"))
    assert {"command", "commit", "hardware", "versions"} <= set(found)
    assert [row["delta"] for row in found["rows"]] == [0.2, 0.6]
    for row in found["rows"]:
        assert (row["cases"], row["violations"]) == (15, 0)
        assert row["median_ratio"] >= row["smallest_ratio"] >= 1.0
    kept = [row["kept_components"] for row in found["rows"]]
    assert 1.0 > kept[0] > kept[1] > 0.0
    assert "delta 0.6: kept " in capsys.readouterr().out


def test_a_bound_that_is_too_small_is_counted(monkeypatch: pytest.MonkeyPatch):
    true = measure_bound(small(), 0.4)
    monkeypatch.setattr(bounds, "output_error_bound", lambda *args: 0.0)
    assert (true["violations"], measure_bound(small(), 0.4)["violations"]) == (0, 15)


def test_one_layer_reaches_its_bound_only_along_the_dropped_direction():
    """A single linear layer: the error is at most sigma_(k+1) ||x||, and ratios show the slack."""
    row = measure_bound(small(depth=1, width=2, inputs=400, networks=20), 0.99)
    assert row["kept_components"] == 0.5
    assert row["violations"] == 0
    assert row["smallest_ratio"] == pytest.approx(1.0, abs=1e-3)


def test_nothing_dropped_has_no_error_and_no_ratio():
    row = measure_bound(small(), 1e-9)
    assert (row["kept_components"], row["violations"], row["median_ratio"]) == (1.0, 0, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": 0}, r"^networks must be an integer >= 1, got 0\.$"),
        ({"deltas": [0.5, 1.0]}, r"^deltas must lie in \(0, 1\), got 1\.0\.$"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check_bounds(small(**changes))

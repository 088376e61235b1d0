"""Reports as JSON and as text for a terminal."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank.ranks.tolerance import LossDifference, Probe
from hf_lowrank.report.quantization import Quantization
from hf_lowrank.report.schema import Report, jsonable
from hf_lowrank.report.sections import Evaluation, Parameters, Recovery, Settings, Sizes
from hf_lowrank.report.text.table import align, format_report, format_sweep

PROMISED = {
    "model",
    "config",
    "seed",
    "versions",
    "parameters",
    "bytes",
    "evaluation",
    "seconds",
    "probes",
    "ranks",
}


def probe(**changes: Any) -> Probe:
    return dataclasses.replace(Probe(0.7, 0.031, 0.042, 0.005, True, True), **changes)


def report(**changes: Any) -> Report:
    """A report whose numbers are all different."""
    values = {
        "model": "tiny",
        "config": Settings(metric="kfac", param_ratio=0.5),
        "seed": 3,
        "versions": {"torch": "2"},
        "parameters": Parameters(1_000_000, 750_000, 500_000, 250_000),
        "bytes": Sizes(4_000_000, 3_100_000),
        "ranks": {"a.0.up": 3, "a.1.up": 8, "a.0.down": None, "a.1.down": 5, "a.0.q": None},
        "evaluation": Evaluation(10.5, 12.25, 2.3514, 2.5055, 0.1541, 0.0123, 4321),
        "predicted_loss_difference": 0.2468,
        "seconds": {"statistics": 12.34, "decomposition": 5.67},
    }
    return Report(**(values | changes))


def lines_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# JSON


def test_the_promised_fields_are_there():
    assert set(report().to_dict()) >= PROMISED


def test_a_saved_report_holds_what_the_report_holds(tmp_path: Path):
    original = report(probes=[probe()], untouched={"a.experts": 5}, failures={"b": "why"})
    original.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text("utf-8")
    data = dataclasses.asdict(original) | {"data": {}}
    assert json.loads(text) == data | {"config": {"metric": "kfac", "param_ratio": 0.5}}
    assert text.endswith("}\n")


def test_dense_layers_have_rank_null(tmp_path: Path):
    report().save(tmp_path / "report.json")
    assert '"a.0.down": null' in (tmp_path / "report.json").read_text("utf-8")


def test_numbers_that_json_lacks_become_null(tmp_path: Path):
    broken = Evaluation(math.inf, math.nan, -math.inf, 1.0, 0.5, 0.25, 7)
    report(evaluation=broken, probes=[probe(predicted=math.nan)]).save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text("utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    data = json.loads(text)
    assert data["evaluation"] == {
        "perplexity_before": None,
        "perplexity_after": None,
        "loss_before": None,
        "loss_after": 1.0,
        "loss_difference": 0.5,
        "standard_error": 0.25,
        "tokens": 7,
    }
    assert data["probes"][0]["predicted"] is None


def test_jsonable_goes_through_lists_tuples_and_dictionaries_and_copies():
    original = {"a": [1.5, math.nan, (math.inf, "x", None, True)], "b": {"c": -math.inf}}
    assert jsonable(original) == {"a": [1.5, None, [None, "x", None, True]], "b": {"c": None}}
    assert math.isnan(original["a"][1])


def test_to_dict_shares_nothing_with_the_report():
    original = report()
    original.to_dict()["ranks"]["a.0.up"] = 99
    assert original.ranks["a.0.up"] == 3


# Tables


def test_sizes_before_and_after_with_the_kept_share():
    lines = lines_of(format_report(report()))
    assert ["parameters", "1,000,000", "750,000", "75.00%"] in lines
    assert ["in", "targeted", "layers", "500,000", "250,000", "50.00%"] in lines
    assert ["megabytes", "4.0", "3.1", "77.50%"] in lines


def test_quality_before_and_after():
    text = format_report(report())
    assert ["perplexity", "10.50", "12.25"] in lines_of(text)
    assert ["loss", "(nats/token)", "2.3514", "2.5055"] in lines_of(text)
    assert (
        "loss difference +0.1541 +- 0.0123 nats per token, over 4,321 tokens of evaluation text"
    ) in text
    assert "predicted by the prices: +0.2468" in text


def test_a_report_without_evaluation_shows_no_quality():
    text = format_report(report(evaluation=None, predicted_loss_difference=None))
    for word in ("perplexity", "loss", "predicted", "None", "nan"):
        assert word not in text


def test_ranks_by_layer_type():
    lines = lines_of(format_report(report()))
    assert ["up", "2", "0", "3", "5.5", "8"] in lines
    assert ["down", "2", "1", "5", "5.0", "5"] in lines
    assert ["q", "1", "1", "-", "-", "-"] in lines


def test_seconds_by_phase():
    assert "seconds: statistics 12.3, decomposition 5.7" in format_report(report())


def test_every_probe_is_shown_with_its_outcome():
    probes = [
        probe(),
        probe(param_ratio=0.5, measured=0.9, feasible=False),
        probe(param_ratio=0.3, measured=2.0, feasible=False, complete=False),
    ]
    held_out = LossDifference(0.042, 0.005, 8, True)
    text = format_report(report(probes=probes, held_out=held_out))
    lines = lines_of(text)
    assert ["0.7000", "+0.0310", "+0.0420", "0.0050", "yes"] in lines
    assert ["0.5000", "+0.0310", "+0.9000", "0.0050", "no"] in lines
    assert ["0.3000", "+0.0310", "+2.0000", "0.0050", "no", "(early)"] in lines
    assert "accepted: +0.0420 +- 0.0050 nats per token on held-out calibration text" in text


def test_without_probes_nothing_is_said_about_a_search():
    assert "probe" not in format_report(report())
    assert "accepted" not in format_report(report())


@pytest.mark.parametrize(("accepted", "word"), [(True, "kept"), (False, "not kept")])
def test_a_recovery_is_shown_with_its_outcome(accepted: bool, word: str):
    text = format_report(report(recovery=Recovery(3.25, 2.75, accepted, 40)))
    assert f"recovery, 40 steps: held-out loss 3.2500 -> 2.7500, {word}\n" in text
    assert "recovery" not in format_report(report())


@pytest.mark.parametrize(
    ("weights", "groups", "end"),
    [
        ("12 int4", {"32": 11, "97": 1}, "; numbers to a scale in int4: 32 in 11, 97 in 1"),
        ("9 int4, 3 int8", {"32": 9}, "; numbers to a scale in int4: 32 in 9"),
        ("12 int8", {}, ", one for each row"),
    ],
)
def test_quantized_weights_are_counted(weights: str, groups: dict[str, int], end: str):
    quantization = Quantization(weights[-4:], 12, groups, Sizes(4_000_000, 1_200_000))
    text = format_report(report(quantization=quantization))
    expected = f"weights of targeted layers: {weights}, 4.0 MB -> 1.2 MB with their scales"
    assert f"\n{expected}{end}\n" in text


def test_layers_that_failed_are_named_with_the_reason():
    text = format_report(report(failures={"a.3.up": "the weight holds NaN or infinity"}))
    assert "kept dense: a.3.up: the weight holds NaN or infinity" in text


def test_untouched_matrices_are_named_with_their_share():
    text = format_report(report(untouched={"a.small": 1_000, "a.experts": 399_000}))
    assert (
        "untouched: 2 matrices inside the blocks, 40.0% of all parameters (the largest: a.experts)"
    ) in text
    assert "untouched" not in format_report(report())


def test_several_sizes_have_a_line_each():
    other = report(
        parameters=Parameters(1_000_000, 600_000, 500_000, 100_001),
        evaluation=None,
    )
    header, first, second = lines_of(format_sweep([report(), other]))
    assert header[:1] == ["param_ratio"]
    assert first == ["0.5000", "750,000", "12.25", "+0.1541", "0.0123"]
    assert second == ["0.2000", "600,000", "-", "-", "-"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([["a", "b"], ["long", "1"]], "a     b\nlong  1"),
        ([["a", "bb", "c"], ["d"]], "a  bb  c\nd"),
        ([["x", "1"], ["y", "100"]], "x    1\ny  100"),
    ],
)
def test_columns_are_aligned(rows: list[list[str]], expected: str):
    assert align(rows) == expected

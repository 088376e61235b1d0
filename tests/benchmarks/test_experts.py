"""The comparison on a small mixture of experts: trained, cut in every way, and written down."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import small_mixture
from benchmarks.experts import METHODS, ExpertsArguments, _evenly, compare_experts, format_experts

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "owl")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def result(tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(WORDS), (6000,), generator=generator).tolist()
    lines = [" ".join(WORDS[i] for i in picked[n : n + 12]) for n in range(0, len(picked), 12)]
    (folder / "text.txt").write_text("\n".join(lines))
    args = ExpertsArguments(
        training=str(folder / "text.txt"),
        evaluation=str(folder / "text.txt"),
        param_ratio=[0.8, 0.6],
        training_sequences=8,
        calibration_sequences=8,
        evaluation_sequences=4,
        sequence_length=16,
        vocab_size=270,
        num_experts=8,
        model_dir=str(folder / "model"),
        output=str(folder / "experts.json"),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setitem(small_mixture.SIZES, name, value)
        compare_experts(args)
        first = json.loads(Path(args.output).read_text("utf-8"))
        compare_experts(args)  # takes the model that is there
    again = json.loads(Path(args.output).read_text("utf-8"))
    assert again["rows"] == first["rows"]
    assert again["training"] == first["training"]
    return first


def test_every_way_stays_within_the_budget(result: dict[str, Any]):
    assert {row["method"] for row in result["rows"]} == set(METHODS)
    for row in result["rows"]:
        assert 0.7 * row["param_ratio"] < row["share"] <= row["param_ratio"]
        narrower, fewer = set(row["widths"]) != {32}, set(row["experts"]) != {8}
        if row["method"] == "fewer by use" or row["method"] == "fewer":
            assert (narrower, fewer) == (False, True)
        elif row["method"].startswith("narrower"):
            assert (narrower, fewer) == (True, False)
    assert result["training"]["tokens"] == 8 * 16
    assert result["training"]["steps"] == 2


def test_the_table_has_a_line_for_each_way(result: dict[str, Any]):
    lines = format_experts(result).splitlines()
    assert lines[0] == "| experts are made | 0.8 | 0.6 |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(METHODS)


def test_shares_are_even():
    assert _evenly(0.9, 16, 4) == [15, 14, 14, 14]
    assert _evenly(0.5, 6, 2) == [3, 3]

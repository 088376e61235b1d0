"""Pictures of ranks: every layer in its place, every rank written down."""

from pathlib import Path

import pytest

from benchmarks.figures import blocks_and_kinds, draw_ranks
from hf_lowrank.errors import ConfigError

NAMES = [f"encoder.layer.{i}.{kind}" for i in (10, 2) for kind in ("key", "output.dense")]


def test_layers_are_sorted_by_block_and_kind():
    blocks, kinds, places = blocks_and_kinds(NAMES)
    assert blocks == ["2", "10"]
    assert kinds == ["key", "output.dense"]
    assert places["encoder.layer.10.key"] == ("10", "key")


def test_every_rank_is_in_the_picture(tmp_path: Path):
    ranks = dict(zip(NAMES, (31, 57, 83, None), strict=True))
    rows = [{"task": "mrpc", "method": "kfac", "param_ratio": 0.1, "ranks": ranks}] * 4
    draw_ranks(rows, tmp_path / "deep" / "ranks.svg")
    text = (tmp_path / "deep" / "ranks.svg").read_text("utf-8")
    # matplotlib draws text as paths and leaves it in comments.
    assert all(text.count(f">{value}</text>") == 4 for value in ("31", "57", "83", "dense"))


def test_no_rows_is_one_sentence(tmp_path: Path):
    with pytest.raises(ConfigError, match="no row to draw"):
        draw_ranks([], tmp_path / "ranks.svg")

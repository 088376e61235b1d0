"""`benchmark.py streaming`: both ways on tiny models, each in a process of its own."""

import json
from pathlib import Path

import pytest

from benchmarks.streaming import StreamingArguments, compare_streaming, make_llama
from hf_lowrank.errors import ConfigError

TINY = {"hidden_size": 32, "intermediate_size": 64, "heads": 8, "vocabulary": 96}
TEXT = {"sequences": 2, "sequence_length": 16}


def test_both_ways_cut_the_same(tmp_path: Path):
    output = tmp_path / "rows.json"
    compare_streaming(
        StreamingArguments(layers=[2], in_memory=[2], **TINY, **TEXT, output=str(output))
    )
    result = json.loads(output.read_text("utf-8"))
    streamed, memory = result["rows"]
    assert (streamed["streamed"], memory["streamed"]) == (True, False)
    assert streamed["kept_parameters"] == memory["kept_parameters"]
    assert streamed["predicted_loss_difference"] == memory["predicted_loss_difference"]
    assert 0 < streamed["bytes_before"] <= streamed["peak_anonymous_bytes"]
    assert streamed["peak_anonymous_bytes"] < streamed["peak_resident_bytes"]
    assert result["arguments"]["hidden_size"] == 32


def test_the_size_is_that_of_the_files(tmp_path: Path):
    size = make_llama(tmp_path, StreamingArguments(**TINY), 3)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 4
    assert size["checkpoint_bytes"] == sum(path.stat().st_size for path in files)
    assert 2 * size["parameters"] < size["checkpoint_bytes"]


def test_a_size_in_memory_alone_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="in_memory some of these"):
        compare_streaming(StreamingArguments(layers=[2], in_memory=[3]))

"""compress_llm.py --stream: the same folder as in memory, and what it refuses."""

from pathlib import Path

import pytest

from hf_lowrank.cli import streamed_command
from hf_lowrank.cli.streamed_command import memory_bytes
from hf_lowrank.errors import ConfigError
from tests.scripts import InProcess, Inputs
from tests.scripts.outputs import read_report


def test_the_folder_is_that_of_a_run_in_memory(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    places = [tmp_path / "memory", tmp_path / "streamed"]
    settings = {"param_ratio": 0.6, "html_report": False, "speed": False, "sample_prompt": "none"}
    compress_llm(*inputs.arguments(**settings, output_dir=places[0]))
    compress_llm(*inputs.arguments(**settings, output_dir=places[1]), "--stream")
    memory, streamed = map(read_report, places)
    for name in ("ranks", "narrowed", "parameters", "evaluation", "data", "architecture", "model"):
        assert streamed[name] == memory[name]
    files = [{path.name for path in place.glob("[!m]*")} for place in places]
    assert files[0] == files[1] >= {"README.md", "config.json", "report.json", "tokenizer.json"}
    assert (places[1] / "modeling_lowrank.py").exists()
    assert [path for path in tmp_path.iterdir() if path not in places] == []


@pytest.mark.parametrize(("limit", "expected"), [("2KB", True), ("2GB", False)])
def test_max_memory_decides(
    limit: str,
    expected: bool,
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    calls = []
    real = streamed_command.compress_checkpoint

    def noted(*args, **options):
        calls.append(options["dtype"])
        return real(*args, **options)

    monkeypatch.setattr(streamed_command, "compress_checkpoint", noted)
    settings = {"param_ratio": 0.6, "output_dir": tmp_path / "out", "max_memory": limit}
    compress_llm(*inputs.arguments(**settings, evaluation="none", speed=False))
    assert bool(calls) == expected
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recover_steps": 4}, "stream has one block in memory at a time; leave out recover_steps"),
        ({"calibration": "generated"}, "block in memory at a time; leave out the text generated."),
        ({"joint": True}, "stream has one block in memory at a time; leave out joint."),
        ({"sample_prompt": "Hello"}, "one block in memory at a time; leave out sample_prompt."),
        ({"output_dir": None}, "stream goes from disk to disk; give --output_dir."),
        ({"max_memory": "2GB"}, "max_memory decides whether to stream; leave it or --stream out."),
        ({"max_memory": "much"}, "max_memory must be a size such as 2GB or 500MB, got 'much'."),
    ],
)
def test_what_can_not_be_streamed_is_refused(
    settings: dict[str, object],
    message: str,
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
):
    found = {"param_ratio": 0.6, "output_dir": tmp_path / "out"} | settings
    given = {name: value for name, value in found.items() if value is not None}
    assert message in compress_llm(*inputs.arguments(**given), "--stream").error


def test_sizes_of_memory():
    assert [memory_bytes(text) for text in ("2GB", "1.5 gb", "500MB")] == [2e9, 1.5e9, 5e8]
    with pytest.raises(ConfigError, match="got '2'"):
        memory_bytes("2")

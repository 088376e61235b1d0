"""The tokens that vLLM writes with compressed checkpoints are those of transformers."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.serving.vllm_engine.checkpoints import CHECKPOINTS, EXPECTED

CLOSE = 1e-4  # of log-probabilities; 4e-6 was seen
EAGER = {"enforce_eager": True}


def check(found, checkpoints, name):
    assert isinstance(found[name], list), found[name]
    for row, expected in zip(
        found[name], json.loads((checkpoints / name / EXPECTED).read_text()), strict=True
    ):
        assert row["prompt"] == expected["prompt"]
        assert row["tokens"] == expected["tokens"]
        assert row["scores"] == pytest.approx(expected["scores"], abs=CLOSE)


@pytest.fixture(scope="module")
def eager(write, checkpoints):
    return write([checkpoints / name for name in CHECKPOINTS], EAGER)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tokens_are_those_of_transformers(eager, checkpoints, name):
    check(eager, checkpoints, name)


@pytest.fixture(scope="module")
def compiled(write, checkpoints):
    return write([checkpoints / "llama_compact"])


def test_so_they_are_where_the_model_is_compiled(compiled, checkpoints):
    check(compiled, checkpoints, "llama_compact")


@pytest.fixture(scope="module")
def spread(write, checkpoints):
    names = ("llama_compact", "llama_factors", "llama_biases")
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    options = {**EAGER, "tensor_parallel_size": 2}
    return write([checkpoints / name for name in names], options, **two)


@pytest.mark.parametrize("name", ["llama_compact", "llama_factors", "llama_biases"])
def test_so_they_are_on_two_ranks(spread, checkpoints, name):
    check(spread, checkpoints, name)


@pytest.fixture(scope="module")
def refused(write, checkpoints, tmp_path_factory):
    """What vLLM says of checkpoints that lack a tensor, or are in another form or version."""
    root = tmp_path_factory.mktemp("broken")

    def broken(name):
        return shutil.copytree(checkpoints / "llama_compact", root / name)

    file = broken("missing") / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("lowrank_B.weight"))
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    for name, changes in {"usv": {"form": "usv"}, "newer": {"format_version": 4}}.items():
        path = broken(name) / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))
    said = write([root / name for name in ("missing", "usv", "newer")], EAGER)
    return said | {"lost": lost.removesuffix(".lowrank_B.weight")}


def test_broken_checkpoints_are_refused(refused):
    assert f"{refused['lost']} has rank" in refused["missing"]
    assert "but no factors" in refused["missing"]
    assert "form 'usv' is that of layers in training" in refused["usv"]
    assert "format_version 4, this hf_lowrank reads 1, 2, 3" in refused["newer"]

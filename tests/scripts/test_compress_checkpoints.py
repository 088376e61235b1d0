"""What compress_llm.py saves: plain transformers and generate.py load it; sizes are as reported."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowrank
from tests.scripts import ROOT, InProcess, Inputs, run_python
from tests.scripts.outputs import file_sizes, mean_loss, read_report


def test_the_output_loads_with_plain_transformers_and_has_the_reported_losses(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.5, output_dir=tmp_path / "small"))
    evaluation = read_report(tmp_path / "small")["evaluation"]
    before = mean_loss(inputs.model, inputs.evaluation)
    after = mean_loss(tmp_path / "small", inputs.evaluation)
    assert after > before + 0.05
    assert evaluation["loss_before"] == pytest.approx(before, abs=1e-5)
    assert evaluation["loss_after"] == pytest.approx(after, abs=1e-5)
    assert evaluation["loss_difference"] == pytest.approx(after - before, abs=2e-5)
    assert evaluation["perplexity_after"] == pytest.approx(math.exp(after), rel=1e-4)
    assert evaluation["tokens"] == 16 * 31


def test_the_output_is_the_native_class_without_missing_or_unexpected_keys(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "small"))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf_lowrank.load(tmp_path / "small").config.quantization_config.param_ratio == 0.6


def test_every_size_comes_with_the_files_of_the_models_processor(
    compress_llm: InProcess, inputs: Inputs, broken: Path, tmp_path: Path
):
    (broken / "preprocessor_config.json").write_text('{"size": 224}', "utf-8")
    settings = inputs.arguments(model=broken, metric="plain", output_dir=tmp_path / "small")
    done = compress_llm(*settings, "--param_ratio", 0.6, 0.4)
    assert done.code == 0, done.err
    for size in ("0.6", "0.4"):
        copied = tmp_path / "small" / size / "preprocessor_config.json"
        assert copied.read_text("utf-8") == '{"size": 224}'


def test_report_counts_what_is_in_the_files(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.8, output_dir=tmp_path / "small"))
    report = read_report(tmp_path / "small")
    for side, folder in (("dense", inputs.model), ("kept", tmp_path / "small")):
        sizes = file_sizes(folder)
        assert report["parameters"][side] == sizes["parameters"]
        assert report["bytes"][side] == sizes["bytes"]
    assert report["parameters"]["kept"] < report["parameters"]["dense"]


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9, 1.0])
def test_the_budget_is_met_within_one_component(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, ratio: float
):
    compress_llm(*inputs.arguments(param_ratio=ratio, output_dir=tmp_path / "small"))
    parameters = read_report(tmp_path / "small")["parameters"]
    budget = ratio * parameters["targeted_dense"]
    largest_component = 32 + 64
    assert budget - largest_component <= parameters["targeted_kept"] <= budget


def test_reported_ranks_are_those_of_the_saved_factors(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.8, output_dir=tmp_path / "small"))
    ranks = read_report(tmp_path / "small")["ranks"]
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert len(ranks) == 14
    assert None in ranks.values()
    assert set(ranks.values()) != {None}
    for name, rank in ranks.items():
        if rank is None:
            assert f"{name}.weight" in tensors
        else:
            assert tensors[f"{name}.lowrank_A.weight"].shape[0] == rank
            assert tensors[f"{name}.lowrank_B.weight"].shape[1] == rank


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_dtype_is_that_of_the_saved_tensors(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, dtype: str, size: int
):
    compress_llm(*inputs.arguments(param_ratio=0.7, dtype=dtype, output_dir=tmp_path / "small"))
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    report = read_report(tmp_path / "small")
    assert report["bytes"]["kept"] == size * report["parameters"]["kept"]
    assert file_sizes(tmp_path / "small")["bytes"] == report["bytes"]["kept"]


def test_the_same_seed_gives_the_same_bytes(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(param_ratio=0.6, label_source="model")
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        compress_llm(*arguments, "--seed", seed, "--output_dir", tmp_path / name)
    first, second, other = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("first", "second", "other")
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("metric", ["plain", "kfac"])
def test_a_ratio_gives_the_same_checkpoint_alone_and_among_others(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, metric: str
):
    arguments = inputs.arguments(metric=metric)
    compress_llm(*arguments, "--output_dir", tmp_path / "one", "--param_ratio", "0.6")
    compress_llm(*arguments, "--output_dir", tmp_path / "many", "--param_ratio", "0.9", "0.6")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (
            tmp_path / "many" / "0.6" / name
        ).read_bytes()
    one, many = read_report(tmp_path / "one"), read_report(tmp_path / "many" / "0.6")
    for field in ("parameters", "bytes", "ranks", "evaluation", "config", "data"):
        assert one[field] == many[field]


def test_a_new_process_compresses_and_another_one_generates(inputs: Inputs, tmp_path: Path):
    output = tmp_path / "small"
    done = run_python(
        ROOT / "scripts" / "compress_llm.py",
        *inputs.arguments(param_ratio=0.8, output_dir=output),
    )
    assert done.code == 0
    assert done.messages == []
    assert f"saved to {output}" in done.out
    spoken = run_python(
        ROOT / "scripts" / "generate.py",
        "--model",
        output,
        "--prompt",
        "w01 w02 w03",
        "--max_new_tokens",
        "5",
    )
    assert spoken.code == 0, spoken.err
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer("w01 w02 w03", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=5, repetition_penalty=1.3, do_sample=False)
    assert spoken.out.strip() == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert spoken.out.startswith("w01 w02 w03")

"""Goals and options of compress_llm.py: sizes, a loss tolerance, metrics, layers, channels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_lowrank
from hf_lowrank.cli import compress_command
from hf_lowrank.config import METRIC_NAMES, RULE_NAMES
from tests.scripts import InProcess, Inputs
from tests.scripts.outputs import CHECKPOINT_FILES, file_sizes, mean_loss, read_report

PAIRS = [
    (metric, rule)
    for metric in METRIC_NAMES
    for rule in RULE_NAMES
    if rule != "price" or metric == "kfac"
]


def test_several_ratios_get_a_folder_each_and_a_table(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    output = tmp_path / "sizes"
    done = compress_llm(*inputs.arguments(output_dir=output), "--param_ratio", "0.9", "0.5", "0.7")
    assert done.code == 0
    assert sorted(path.name for path in output.iterdir()) == ["0.5", "0.7", "0.9"]
    table = [line.split() for line in done.out.splitlines()[-3:]]
    for row, ratio in zip(table, (0.9, 0.5, 0.7), strict=True):
        report = read_report(output / str(ratio))
        assert report["config"]["param_ratio"] == ratio
        assert {path.name for path in (output / str(ratio)).iterdir()} == CHECKPOINT_FILES
        assert file_sizes(output / str(ratio))["parameters"] == report["parameters"]["kept"]
        evaluation = report["evaluation"]
        assert row[1:] == [
            f"{report['parameters']['kept']:,}",
            f"{evaluation['perplexity_after']:.2f}",
            f"{evaluation['loss_difference']:+.4f}",
            f"{evaluation['standard_error']:.4f}",
        ]
        assert float(row[0]) == pytest.approx(ratio, abs=0.01)


def test_several_ratios_decompose_only_once(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decompose, calls = hf_lowrank.compression.analysis.decompose, []

    def counted(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(weight.shape)
        return decompose(weight, *args, **kwargs)

    monkeypatch.setattr(hf_lowrank.compression.analysis, "decompose", counted)
    compress_llm(*inputs.arguments(), "--param_ratio", "0.9", "0.7", "0.5")
    assert len(calls) == 14


def test_a_loss_tolerance_is_kept_on_its_own_held_out_text(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    done = compress_llm(*inputs.arguments(loss_tolerance=0.1, output_dir=tmp_path / "small"))
    report = read_report(tmp_path / "small")
    assert report["config"]["loss_tolerance"] == 0.1
    assert report["held_out"]["mean"] <= 0.1
    assert report["held_out"]["complete"] is True
    assert report["parameters"]["targeted_kept"] < report["parameters"]["targeted_dense"]
    assert report["probes"]
    for probe in report["probes"]:
        assert 0 < probe["param_ratio"] <= 1
        assert probe["feasible"] == (probe["measured"] <= 0.1 and probe["complete"])
        assert f"{probe['predicted']:+.4f}" in done.out
        assert f"{probe['measured']:+.4f}" in done.out
    feasible = [probe["param_ratio"] for probe in report["probes"] if probe["feasible"]]
    kept = report["parameters"]["targeted_kept"] / report["parameters"]["targeted_dense"]
    assert kept == pytest.approx(min(feasible))
    assert mean_loss(tmp_path / "small", inputs.evaluation) > 0


def test_no_plan_is_measured_twice_in_a_search(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(loss_tolerance=0.1, output_dir=tmp_path / "small"))
    ratios = [probe["param_ratio"] for probe in read_report(tmp_path / "small")["probes"]]
    assert len(ratios) == len(set(ratios))


def test_the_default_goal_is_a_loss_tolerance_of_a_twentieth_of_a_nat(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    default = inputs.arguments(output_dir=tmp_path / "default")
    explicit = inputs.arguments(output_dir=tmp_path / "explicit", loss_tolerance=0.05)
    for arguments in (default, explicit):
        assert compress_llm(*arguments).code == 0
    one, two = read_report(tmp_path / "default"), read_report(tmp_path / "explicit")
    assert one["probes"] == two["probes"]
    assert one["ranks"] == two["ranks"]
    assert one["held_out"]["mean"] <= 0.05


def test_a_tolerance_without_predictions_writes_null_for_them(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(
        loss_tolerance=0.1, metric="whitened", output_dir=tmp_path / "small"
    )
    assert compress_llm(*arguments).code == 0
    report = read_report(tmp_path / "small")
    assert {probe["predicted"] for probe in report["probes"]} == {None}
    assert report["predicted_loss_difference"] is None


def test_recovery_trains_the_factors_and_reports_what_it_did(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(param_ratio=0.4)
    assert compress_llm(*arguments, "--output_dir", tmp_path / "cut").code == 0
    done = compress_llm(*arguments, "--output_dir", tmp_path / "trained", "--recover_steps", "20")
    assert done.code == 0
    cut, trained = read_report(tmp_path / "cut"), read_report(tmp_path / "trained")
    assert cut["recovery"] is None
    recovery = trained["recovery"]
    assert recovery["steps"] == 20
    assert recovery["accepted"] == (recovery["loss_after"] < recovery["loss_before"])
    assert f"{recovery['loss_before']:.4f} -> {recovery['loss_after']:.4f}" in done.out
    loss = mean_loss(tmp_path / "trained", inputs.evaluation)
    assert trained["evaluation"]["loss_after"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(("metric", "rule"), PAIRS)
def test_every_metric_works_with_every_rule(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, metric: str, rule: str
):
    done = compress_llm(
        *inputs.arguments(metric=metric, rule=rule, param_ratio=0.6, output_dir=tmp_path / "small")
    )
    assert done.code == 0
    report = read_report(tmp_path / "small")
    assert (report["config"]["metric"], report["config"]["rule"]) == (metric, rule)
    assert report["evaluation"]["loss_after"] > report["evaluation"]["loss_before"]
    assert report["failures"] == {}
    assert report["parameters"]["targeted_kept"] <= 0.6 * report["parameters"]["targeted_dense"]
    assert hf_lowrank.load(tmp_path / "small") is not None


def test_channels_are_taken_out_on_request(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    folder = tmp_path / "small"
    done = compress_llm(
        *inputs.arguments(param_ratio=0.6, output_dir=folder, speed=None), "--channels"
    )
    report, tensors = read_report(folder), load_file(folder / "model.safetensors")
    assert "most channels" in done.out
    assert report["narrowed"]
    for name, shape in report["narrowed"].items():
        assert list(tensors[f"{name}.weight"].shape) == shape
    assert report["parameters"]["kept"] == file_sizes(folder)["parameters"]
    assert report["speed"]["compressed"]["prefill_tokens_per_second"] > 0
    after = mean_loss(folder, inputs.evaluation)
    assert report["evaluation"]["loss_after"] == pytest.approx(after, abs=1e-5)
    card = (folder / "README.md").read_text("utf-8")
    assert "Some feed-forwards have fewer channels in place of factors." in card
    assert "Ranks, and channels of feed-forwards, by metric kfac" in card


def test_chosen_layers_and_excluded_layers(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    compress_llm(
        *inputs.arguments(param_ratio=0.5, output_dir=tmp_path / "small"),
        "--target_modules",
        "q_proj",
        "model.layers.*.mlp.*",
        "--exclude_modules",
        "model.layers.1.mlp.up_proj",
        "gate_proj",
    )
    assert set(read_report(tmp_path / "small")["ranks"]) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }


def test_the_size_of_batches_changes_no_number(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    for size in (1, 5):
        arguments = inputs.arguments(param_ratio=0.6, output_dir=tmp_path / str(size))
        assert compress_llm(*arguments, "--batch_size", size).code == 0
    one, five = (read_report(tmp_path / str(size)) for size in (1, 5))
    assert one["ranks"] == five["ranks"]
    assert one["evaluation"] == pytest.approx(five["evaluation"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_are_stored_in_fewer_bits(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, weights: str
):
    pytest.importorskip("torchao.quantization")
    output = tmp_path / weights
    done = compress_llm(
        *inputs.arguments(param_ratio=0.6, weights=weights, output_dir=output), "--channels"
    )
    assert done.code == 0
    report = read_report(output)
    assert report["config"]["weights"] == weights
    section = report["quantization"]
    assert section["weights"] == weights
    assert "weights of targeted layers: " in done.out
    assert mean_loss(output, inputs.evaluation) == pytest.approx(
        report["evaluation"]["loss_after"], abs=1e-5
    )
    card = (output / "README.md").read_text("utf-8")
    assert f" {weights}, " in card
    assert "Loading needs torchao." in card


def test_a_size_in_megabytes(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    pytest.importorskip("torchao.quantization")
    output = tmp_path / "small"
    done = compress_llm(*inputs.arguments(megabytes=0.04, output_dir=output))
    assert done.code == 0
    assert (output / "model.safetensors").stat().st_size <= 40_000
    report = read_report(output)
    assert report["config"]["megabytes"] == 0.04
    assert report["quantization"]["weights"] == "mixed"
    assert " int8, " in done.out
    assert "at most 0.04 MB" in (output / "README.md").read_text("utf-8")


def test_a_size_out_of_reach_is_refused_before_texts_are_read(
    compress_llm: InProcess, inputs: Inputs
):
    compress_llm.monkeypatch.setattr(compress_command, "batches_by_role", pytest.fail)
    done = compress_llm(*inputs.arguments(megabytes=0.001))
    assert done.code == 2
    assert "megabytes=0.001 is too small: with the smallest ranks in int4 the model" in done.err

"""`scripts/compress_llm.py` on good input, and `scripts/generate.py` on what it saved."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowrank
from hf_lowrank import jobs, sources
from hf_lowrank.config import METRIC_NAMES, RULE_NAMES
from tests.scripts import ROOT, InProcess, Inputs, leftovers, make_inputs, run_python

PAIRS = [
    (metric, rule)
    for metric in METRIC_NAMES
    for rule in RULE_NAMES
    if rule != "price" or metric == "kfac"
]
CHECKPOINT_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_lowrank.py",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def compress_llm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess("compress_llm", monkeypatch, capsys)


def read_report(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "report.json").read_text("utf-8")
    report: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return report


def file_sizes(folder: Path) -> dict[str, int]:
    tensors = load_file(folder / "model.safetensors").values()
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def mean_loss(folder: Path, text: Path, sequences: int = 16, length: int = 32) -> float:
    """Mean next-token loss over windows spread evenly over a text, without the library's code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor(tokenizer(text.read_text("utf-8"))["input_ids"])
    stride = (len(tokens) - length) // (sequences - 1)
    windows = torch.stack([tokens[i * stride :][:length] for i in range(sequences)])
    with torch.no_grad():
        logits = model(windows).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def test_one_ratio_is_saved_into_the_output_folder_itself(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    output = tmp_path / "new" / "small"
    done = compress_llm(*inputs.arguments(param_ratio=0.8, output_dir=output))
    assert done.code == 0
    assert {path.name for path in output.iterdir()} == CHECKPOINT_FILES
    assert [path.name for path in output.parent.iterdir()] == ["small"]
    assert f"saved to {output}\n" in done.out
    assert done.messages == []


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


def test_report_has_the_promised_fields_with_their_types(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.8, seed=7, output_dir=tmp_path / "small"))
    report = read_report(tmp_path / "small")
    assert report["model"] == str(inputs.model)
    assert report["seed"] == 7
    assert report["config"]["param_ratio"] == 0.8
    assert report["config"]["metric"] == "kfac"
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    assert all(isinstance(version, str) for version in report["versions"].values())
    counts = {"dense", "kept", "targeted_dense", "targeted_kept"}
    assert set(report["parameters"]) == counts
    assert set(report["bytes"]) == {"dense", "kept"}
    for sizes in (report["parameters"], report["bytes"]):
        assert all(type(size) is int and size > 0 for size in sizes.values())
    numbers = {
        "perplexity_before",
        "perplexity_after",
        "loss_before",
        "loss_after",
        "loss_difference",
        "standard_error",
    }
    assert set(report["evaluation"]) == numbers | {"tokens"}
    assert all(type(report["evaluation"][name]) is float for name in numbers)
    assert type(report["evaluation"]["tokens"]) is int
    assert {"statistics", "decomposition", "evaluation"} <= set(report["seconds"])
    assert all(type(value) is float and value >= 0 for value in report["seconds"].values())
    assert report["probes"] == []


def test_report_names_the_version_of_hf_lowrank(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(*inputs.arguments(param_ratio=0.8, output_dir=tmp_path / "small"))
    versions = read_report(tmp_path / "small")["versions"]
    assert versions.get("hf-lowrank") == hf_lowrank.__version__


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


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9, 1.0])
def test_the_budget_is_met_within_one_component(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, ratio: float
):
    compress_llm(*inputs.arguments(param_ratio=ratio, output_dir=tmp_path / "small"))
    parameters = read_report(tmp_path / "small")["parameters"]
    budget = ratio * parameters["targeted_dense"]
    largest_component = 32 + 64
    assert budget - largest_component <= parameters["targeted_kept"] <= budget


def test_the_table_shows_what_the_report_holds(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    done = compress_llm(*inputs.arguments(param_ratio=0.7, output_dir=tmp_path / "small"))
    report = read_report(tmp_path / "small")
    evaluation, parameters = report["evaluation"], report["parameters"]
    lines = [line.split() for line in done.out.splitlines()]
    kept = f"{parameters['kept'] / parameters['dense']:.2%}"
    assert ["parameters", f"{parameters['dense']:,}", f"{parameters['kept']:,}", kept] in lines
    perplexities = [f"{evaluation[key]:.2f}" for key in ("perplexity_before", "perplexity_after")]
    assert ["perplexity", *perplexities] in lines
    difference, error = evaluation["loss_difference"], evaluation["standard_error"]
    assert f"loss difference {difference:+.4f} +- {error:.4f} nats per token" in done.out
    down = [rank for name, rank in report["ranks"].items() if name.endswith("down_proj")]
    row = next(line for line in lines if line and line[0] == "down_proj")
    assert row[1:3] == ["2", str(down.count(None))]
    assert f"statistics {report['seconds']['statistics']:.1f}, decomposition " in done.out


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


def test_the_speed_is_measured_unless_it_is_not_wanted(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(speed=None, evaluation="none", metric="plain")
    sizes = ("--param_ratio", "0.7", "0.4", "--output_dir", tmp_path / "timed")
    done = compress_llm(*arguments, *sizes)
    assert done.code == 0
    assert done.messages == []
    for size in ("0.7", "0.4"):
        report = read_report(tmp_path / "timed" / size)
        rates = [
            f"{report['speed'][side]['decode_tokens_per_second']:,.1f}"
            for side in ("dense", "compressed")
        ]
        assert f"decode (tokens/s) {' '.join(rates)} " in " ".join(done.out.split())
        assert report["seconds"]["speed"] > 0
    assert done.out.splitlines()[-3].endswith("prefill speed-up  decode speed-up")
    other = ("--no_speed", "--param_ratio", "0.7", "--output_dir", tmp_path / "untimed")
    done = compress_llm(*arguments, *other)
    report = read_report(tmp_path / "untimed")
    assert report["speed"] is None
    assert "speed" not in report["seconds"]
    assert not any(word in done.out for word in ("tokens/s", "speed-up", "speed 0", "machine"))


def test_several_ratios_decompose_only_once(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decompose, calls = hf_lowrank.analysis.decompose, []

    def counted(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(weight.shape)
        return decompose(weight, *args, **kwargs)

    monkeypatch.setattr(hf_lowrank.analysis, "decompose", counted)
    compress_llm(*inputs.arguments(), "--param_ratio", "0.9", "0.7", "0.5")
    assert len(calls) == 14


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


def test_the_report_has_a_page_and_both_models_words(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(
        output_dir=tmp_path / "sizes", html_report=True, sample_prompt="w01 w02 w03"
    )
    done = compress_llm(*arguments, "--param_ratio", "0.9", "0.3")
    assert done.code == 0
    assert done.messages == []
    names = {path.name for path in (tmp_path / "sizes").iterdir()}
    assert names == {"0.9", "0.3", "compare.html"}
    curve = (tmp_path / "sizes" / "compare.html").read_text("utf-8")
    for ratio in ("0.9", "0.3"):
        folder = tmp_path / "sizes" / ratio
        assert {path.name for path in folder.iterdir()} == CHECKPOINT_FILES | {"report.html"}
        (sample,) = read_report(folder)["samples"]
        assert sample["prompt"] == "w01 w02 w03"
        for model, key in ((inputs.model, "dense"), (folder, "compressed")):
            assert sample[key] == continuation(model, "w01 w02 w03")
            assert sample[key] in (folder / "report.html").read_text("utf-8")
            assert sample[key] in curve
        assert "report.html" in (folder / "README.md").read_text("utf-8")


def continuation(folder: Path, prompt: str) -> str:
    """40 greedy tokens, without the library's code."""
    tokenizer, model = (
        auto.from_pretrained(folder) for auto in (AutoTokenizer, AutoModelForCausalLM)
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    size = ids.shape[1]
    for _ in range(40):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
        if following == tokenizer.eos_token_id:
            break
    text: str = tokenizer.decode(ids[0, size:], skip_special_tokens=True)
    return text


def test_without_matplotlib_the_page_is_left_out_and_one_sentence_says_so(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = tmp_path / "small"
    done = compress_llm(*inputs.arguments(param_ratio=0.8, output_dir=output, html_report=True))
    assert done.code == 0
    assert {path.name for path in output.iterdir()} == CHECKPOINT_FILES
    assert done.messages == [
        "report.html is left out: it needs matplotlib (pip install 'hf-lowrank[plots]')"
    ]


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


def test_held_out_text_is_not_calibration_text(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = {}
    compress = jobs.compress

    def spy(model: Any, config: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return compress(model, config, **kwargs)

    monkeypatch.setattr(jobs, "compress", spy)
    compress_llm(*inputs.arguments(loss_tolerance=0.1))
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    tokens = tokenizer(inputs.calibration.read_text("utf-8"))["input_ids"]
    parts = {
        "calibration": tokens[: 3 * len(tokens) // 4],
        "held_out": tokens[3 * len(tokens) // 4 :],
    }
    for role, part in parts.items():
        starts = {tuple(part[i : i + 32]) for i in range(len(part) - 31)}
        windows = [tuple(row) for batch in seen[role] for row in batch["input_ids"].tolist()]
        assert len(windows) == {"calibration": 16, "held_out": 8}[role]
        assert set(windows) <= starts


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


def test_evaluation_can_be_skipped(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    done = compress_llm(
        *inputs.arguments(param_ratio=0.7, evaluation="none", output_dir=tmp_path / "small")
    )
    assert done.code == 0
    assert read_report(tmp_path / "small")["evaluation"] is None
    assert "perplexity" not in done.out
    assert "predicted by the prices" in done.out


def test_without_an_output_folder_nothing_is_written(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = compress_llm(*inputs.arguments(param_ratio=0.7))
    assert done.code == 0
    assert "saved to" not in done.out
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_batches_changes_no_number(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    for size in (1, 5):
        arguments = inputs.arguments(param_ratio=0.6, output_dir=tmp_path / str(size))
        assert compress_llm(*arguments, "--batch_size", size).code == 0
    one, five = (read_report(tmp_path / str(size)) for size in (1, 5))
    assert one["ranks"] == five["ranks"]
    assert one["evaluation"] == pytest.approx(five["evaluation"], rel=1e-3, abs=1e-4)


def test_the_report_says_which_text_was_used(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    compress_llm(
        *inputs.arguments(
            param_ratio=0.8,
            calibration_sequences=6,
            sequence_length=20,
            output_dir=tmp_path / "small",
        )
    )
    assert read_report(tmp_path / "small")["data"] == {
        "calibration_tokens": 120,
        "calibration": str(inputs.calibration),
        "evaluation": str(inputs.evaluation),
    }


def as_jsonl(text: str, path: Path) -> None:
    path.write_text(json.dumps({"id": 1, "text": text}) + "\n\n", encoding="utf-8")


def as_parquet(text: str, path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": [text], "id": [1]}), path)


@pytest.mark.parametrize(
    ("write", "suffix"), [(as_jsonl, "jsonl"), (as_parquet, "parquet")], ids=["jsonl", "parquet"]
)
def test_other_file_types_give_the_same_result_as_plain_text(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, write: Any, suffix: str
):
    changed = {}
    for role in ("calibration", "evaluation"):
        changed[role] = tmp_path / f"{role}.{suffix}"
        write(getattr(inputs, role).read_text("utf-8"), changed[role])
    for name, changes in (("txt", {}), (suffix, changed)):
        arguments = inputs.arguments(param_ratio=0.6, output_dir=tmp_path / name, **changes)
        assert compress_llm(*arguments).code == 0
    plain, other = read_report(tmp_path / "txt"), read_report(tmp_path / suffix)
    assert other["evaluation"] == plain["evaluation"]
    assert (tmp_path / suffix / "model.safetensors").read_bytes() == (
        tmp_path / "txt" / "model.safetensors"
    ).read_bytes()


def test_a_second_run_takes_moments_and_spectra_from_the_cache(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def arguments(name: str) -> list[str]:
        return inputs.arguments(
            param_ratio=0.6, output_dir=tmp_path / name, cache_dir=tmp_path / "cache"
        )

    compress_llm(*arguments("first"))
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert sorted(name.partition("-")[0] for name in written) == ["moments", "spectra"]
    for name in ("collect_moments", "decompose"):
        monkeypatch.setattr(hf_lowrank.analysis, name, None)
    assert compress_llm(*arguments("second")).code == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == written
    first, second = read_report(tmp_path / "first"), read_report(tmp_path / "second")
    assert second["ranks"] == first["ranks"]
    assert second["evaluation"] == first["evaluation"]
    assert not {"statistics", "decomposition"} & set(second["seconds"])
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()


def test_a_run_killed_after_calibration_goes_on_from_its_moments(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = inputs.arguments(param_ratio=0.6, cache_dir=tmp_path / "cache")

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hf_lowrank.analysis, "decompose", killed)
        assert compress_llm(*arguments).code == 130
    monkeypatch.setattr(hf_lowrank.analysis, "collect_moments", None)
    output = tmp_path / "small"
    assert compress_llm(*arguments, "--output_dir", output).code == 0
    monkeypatch.undo()
    compress_llm(*inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "fresh"))
    assert (output / "model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "model.safetensors"
    ).read_bytes()


def test_an_old_output_folder_is_replaced_when_asked_for(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path
):
    output = tmp_path / "small"
    for ratio in (0.9, 0.5):
        done = compress_llm(
            *inputs.arguments(param_ratio=ratio, output_dir=output), "--overwrite_output_dir"
        )
        assert done.code == 0
        (output / "stale.txt").write_text("old")
    (output / "stale.txt").unlink()
    assert {path.name for path in output.iterdir()} == CHECKPOINT_FILES
    assert read_report(output)["config"]["param_ratio"] == 0.5
    assert leftovers(tmp_path) == []


def test_an_empty_output_folder_is_used(compress_llm: InProcess, inputs: Inputs, tmp_path: Path):
    (tmp_path / "small").mkdir()
    done = compress_llm(*inputs.arguments(param_ratio=0.9, output_dir=tmp_path / "small"))
    assert done.code == 0
    assert (tmp_path / "small" / "config.json").is_file()


def test_a_relative_output_folder_is_taken_from_the_current_folder(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert compress_llm(*inputs.arguments(param_ratio=0.9, output_dir="a/b/")).code == 0
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_the_demo_uses_three_parts_of_the_demo_text(
    compress_llm: InProcess, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "_demo_folder", lambda: inputs.model)
    done = compress_llm(
        *inputs.arguments(
            model=None, calibration=None, evaluation=None, output_dir=tmp_path / "small"
        )
    )
    assert done.code == 0
    report = read_report(tmp_path / "small")
    assert report["model"] == "demo"
    assert (report["data"]["calibration"], report["data"]["evaluation"]) == ("demo", "demo")
    assert report["probes"]


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

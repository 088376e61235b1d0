"""The comparison of systems: its rows, that it goes on where it was, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import systems
from benchmarks.catalogue import RANKED, STRUCTURED, SYSTEMS, select_systems
from benchmarks.cost import Cost, counted
from benchmarks.searches.search import SEARCHES
from benchmarks.structured.methods import METHODS
from benchmarks.system_rows import read_rows
from benchmarks.system_tables import format_systems
from benchmarks.systems import BenchmarkOptions, BenchmarkTexts, compare_systems
from hf_lowrank import LowRankLinear, config
from hf_lowrank.compression import application
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.errors import ConfigError, DataError, NumericalError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.modeling.surgery import factorize_
from hf_lowrank.ranks.rules import RULES
from tests.scripts import InProcess, make_inputs
from tests.tiny_models import tiny_llama, tiny_phi3, token_batches, written_batches

SOME = ["svd", "svd-llm", "kim2020+kfac", "kfac+price", "joint"]


@pytest.fixture(scope="module")
def texts():
    written = written_batches(tiny_llama(), num_batches=8)
    evaluation = {"in_domain": written[5:], "out_of_domain": token_batches(2, seed=5)}
    return BenchmarkTexts(written[:3], written[3:5], evaluation)


def compare(texts, folder, names=SOME, ratios=(0.5,), model=None, **settings):
    options = BenchmarkOptions(ratios, names, trials=3)
    return compare_systems(model or tiny_llama(), texts, options, folder, settings)


def test_rows_say_what_was_kept_and_what_it_cost(texts, tmp_path: Path):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = compare(texts, tmp_path, model=model)
    assert [row["name"] for row in rows] == SOME
    by_name = {row["name"]: row for row in rows}
    assert all(0.4 < row["kept_parameters"] / row["dense_parameters"] <= 0.5 for row in rows)
    dense = measure_loss(tiny_llama(), texts.evaluation["in_domain"])
    for row in rows:
        assert row["in_domain"]["perplexity_before"] == pytest.approx(dense.perplexity)
        assert row["in_domain"]["tokens"] == 3 * 4 * 15
        assert row["out_of_domain"]["tokens"] == 2 * 2 * 15
        assert row["total_seconds"] >= row["search_seconds"] > 0
        assert row["decompositions"] >= 14
        assert row["peak_mib"] > 10
        assert row["commit"]
    assert (by_name["svd"]["forwards"], by_name["svd"]["backwards"]) == (0, 0)
    assert (by_name["svd-llm"]["forwards"], by_name["svd-llm"]["backwards"]) == (12, 0)
    assert (by_name["kfac+price"]["forwards"], by_name["kfac+price"]["backwards"]) == (12, 12)
    assert by_name["kim2020+kfac"]["forwards"] == 12 + 8 * (1 + 3)
    assert by_name["joint"]["backwards"] == 12 + 4  # one batch shows which layers qualify
    assert by_name["kfac+price"]["in_domain"] != by_name["svd"]["in_domain"]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    table = format_systems(rows).split("\n")
    assert len(table) == 2 + 1 + len(rows)  # the dense model's line
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("name", ["price+channels+measured", "joint"])
def test_systems_are_cut_to_two_factors_whatever_the_default_form_is(
    texts, tmp_path: Path, monkeypatch, name
):
    found = []
    for form in ("factors", "compact"):
        monkeypatch.setattr(config, "DEFAULT_FORM", form)
        [row] = compare(texts, tmp_path / form, [name])
        found.append((row["kept_parameters"], row["in_domain"]["perplexity_after"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["kfac-uniform", "joint"])
def test_the_same_with_compact_factors_keeps_more_ranks_in_the_same_budget(
    texts, tmp_path: Path, monkeypatch, name
):
    kept = {}

    def note(model, factors, plan, orders=None):
        kept[plan.form] = sum(rank or 0 for rank in plan.ranks.values())
        return factorize_(model, factors, plan, orders)

    for module in (systems, application):
        monkeypatch.setattr(module, "factorize_", note)
    rows = compare(texts, tmp_path, [name, f"{name}+compact"])
    assert [row["form"] for row in rows] == ["factors", "compact"]
    assert all(0.45 < row["kept_parameters"] / row["dense_parameters"] <= 0.5 for row in rows)
    assert kept["compact"] > 1.1 * kept["factors"]


def test_structured_systems_have_rows_of_the_same_kind(texts, tmp_path: Path):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = compare(texts, tmp_path, list(METHODS), model=model)
    assert sorted(row["name"] for row in rows) == sorted(METHODS)
    for row in rows:
        assert 0.45 < row["kept_parameters"] / row["dense_parameters"] <= 0.5
        data_free = row["name"].startswith("model-folding")
        has_prices = row["name"] == "price+channels"
        passes = (0 if data_free else 12, 12 if has_prices else 0)
        assert (row["forwards"], row["backwards"]) == passes
        assert row["in_domain"]["perplexity_after"] > row["in_domain"]["perplexity_before"]
        assert row["decompositions"] > 0
    assert {row["kept_parameters"] for row in rows} != {rows[0]["kept_parameters"]}
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert format_systems(rows).count("pruned channels") == 1


def test_a_structured_system_says_why_it_can_not(texts, tmp_path: Path):
    rows = compare(texts, tmp_path, ["lorap"], model=tiny_phi3())
    assert "no feed-forward of a known kind" in rows[0]["error"]


def test_rows_that_are_there_are_not_measured_again(texts, tmp_path: Path, monkeypatch):
    first = compare(texts, tmp_path, ["svd"])

    class Broken(systems._Bench):
        def row(self, system, param_ratio):
            assert (system.name, param_ratio) == ("svd", 0.7)
            return super().row(system, param_ratio)

    monkeypatch.setattr(systems, "_Bench", Broken)
    second = compare(texts, tmp_path, ["svd"], (0.5, 0.7))
    assert second[0] == first[0]
    assert second[1]["param_ratio"] == 0.7
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "settings.json",
        "svd-0.5.json",
        "svd-0.7.json",
    ]


def test_what_another_row_measured_costs_the_same_again(texts, tmp_path: Path):
    """Layers cut one by one lose the same whatever the size wanted in the end."""
    rows = compare(texts, tmp_path, ["asvd"], (0.5, 0.7))
    assert rows[0]["forwards"] == rows[1]["forwards"] == 12 + 4 * (1 + 14 * 4)
    assert rows[1]["search_seconds"] > 0.5 * rows[0]["search_seconds"]
    assert rows[0]["kept_parameters"] < rows[1]["kept_parameters"]


def test_rows_of_other_settings_are_refused(texts, tmp_path: Path):
    compare(texts, tmp_path, ["svd"], model_name="one")
    with pytest.raises(ConfigError, match=r"holds rows of other settings \(see settings\.json\)"):
        compare(texts, tmp_path, ["svd"], model_name="other")


def test_a_failed_row_says_why_and_does_not_end_the_comparison(texts, tmp_path: Path, monkeypatch):
    def fail(*args, **kwargs):
        raise NumericalError("a planted failure")

    monkeypatch.setattr(systems, "search_plan", fail)
    rows = compare(texts, tmp_path, ["svd", "joint"])
    assert rows[0]["error"] == "a planted failure"
    assert "error" not in rows[1]
    assert "failed: a planted failure" in format_systems(rows)
    assert json.loads((tmp_path / "svd-0.5.json").read_text())["error"] == "a planted failure"


def test_texts_that_overlap_are_refused(texts, tmp_path: Path):
    overlapping = BenchmarkTexts(texts.calibration, texts.held_out, {"test": texts.held_out})
    with pytest.raises(DataError, match="Item 0 of the test set is also in the held_out set"):
        compare(overlapping, tmp_path)


def test_systems_exist_once_and_name_known_parts():
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS)
    pruned = {"sparsity", "sparsity-whitened"}  # for weights that were pruned first
    ranked = [system for system in SYSTEMS if system.kind == RANKED]
    assert {system.metric for system in ranked} == set(METRICS) - pruned
    assert {system.rule for system in ranked} == {*RULES, *SEARCHES} - {"energy"}
    assert {s.name for s in SYSTEMS if s.kind == STRUCTURED} == set(METHODS)
    assert [s.name for s in SYSTEMS if s.kind not in (RANKED, STRUCTURED)] == [
        "joint",
        "joint+compact",
    ]
    assert select_systems([]) == list(SYSTEMS)
    with pytest.raises(ConfigError, match=r"^No system 'magic'; there are svd, "):
        select_systems(["svd", "magic"])


def test_costs_are_counted_and_added():
    model, batch = tiny_llama(), token_batches(1)[0]
    with counted(model) as cost:
        with torch.no_grad():
            model(**batch)
        model(**batch).logits.sum().backward()
    assert (cost.forwards, cost.backwards) == (4, 2)
    assert cost.seconds > 0
    assert not model.base_model._forward_pre_hooks
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 1) == Cost(11, 22, 33, 4)


def test_the_command(tmp_path: Path, monkeypatch, capsys):
    inputs = make_inputs(tmp_path)
    run = InProcess("benchmark", monkeypatch, capsys)
    folder = tmp_path / "rows"
    unknown = dict.fromkeys(("html_report", "sample_prompt", "speed", "output_dir"))
    given = inputs.arguments(folder=folder, foreign_evaluation=None, **unknown)
    arguments = ["systems", *given, "--param_ratio", "0.6", "0.4", "--systems"]
    finished = run(*arguments, "svd-llm", "kfac+price")
    assert finished.code == 0, finished.err
    rows = read_rows(folder)
    assert [(row["name"], row["param_ratio"]) for row in rows] == [
        ("svd-llm", 0.6),
        ("svd-llm", 0.4),
        ("kfac+price", 0.6),
        ("kfac+price", 0.4),
    ]
    assert f"| 1 | dense |  |  | {rows[0]['dense_parameters']:,} |" in finished.out
    assert "| kfac+price | this library | layer-wise | theory | after training |" in finished.out
    assert run(*arguments, "x").error.startswith("No system 'x'; there are svd, ")
    # The other half of a comparison.
    other = run(*arguments, "svd")
    assert other.code == 0, other.err
    found = [row["name"] for row in read_rows(folder)]
    assert found == ["svd"] * 2 + ["svd-llm"] * 2 + ["kfac+price"] * 2
    assert all(f"| 0.6 | {name} |" in other.out for name in found)

"""Types chosen layer by layer: the size holds, and no single type is predicted to be better."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression import byte_budget
from hf_lowrank.compression.byte_budget import applied, fits
from hf_lowrank.compression.byte_plan import mixed_plan
from hf_lowrank.compression.rounding_prices import rounding_prices
from hf_lowrank.format.torchao_weights import precision_of, quantized_modules
from hf_lowrank.modeling.stored_size import SizeOnDisk
from hf_lowrank.report.text.table import format_report
from tests.compression.analyzed import analyzed
from tests.tiny_models import logits, tiny_gpt2, tiny_llama

pytest.importorskip("torchao.quantization")
FORMS = pytest.mark.parametrize("form", ["compact", "factors"])


def predicted(analysis, prices, fit, model):
    """What the prices say of a plan and its types, layer by layer, as they are in the model."""
    total = analysis.predicted_rise(fit.plan)
    with applied(model, analysis, fit):
        bits = {n: precision_of(m.weight).bits for n, m in quantized_modules(model).items()}
    for name, rank in fit.plan.ranks.items():
        if rank is not None:
            pair = tuple(bits.get(f"{name}.lowrank_{end}") for end in "AB")
            total += prices[name].low_rank_rise(rank, pair, fit.plan.form)
        else:
            left = fit.plan.narrowed.get(name, fit.plan.shapes[name])
            share = min(a / b for a, b in zip(left, fit.plan.shapes[name], strict=True))
            total += share * prices[name].rise(bits.get(name))
    return total


@pytest.mark.parametrize(
    ("build", "form", "limits"),
    [(tiny_llama, "factors", (45_000, 32_000)), (tiny_gpt2, "compact", (60_000, 45_000))],
)
def test_the_size_holds_and_every_single_type_is_predicted_to_cost_more(build, form, limits, text):
    model = build()
    config = LowRankConfig(megabytes=1, channels=True, form=form)
    analysis = analyzed(model, config, text[:6])
    prices = rounding_prices(model, analysis)
    mixtures = 0
    for limit in limits:
        goal = analysis.with_config(config.replace(megabytes=limit / 1e6))
        [mixed] = fits(model, goal, prices)
        assert mixed.size == SizeOnDisk(model)(mixed.plan, mixed.weights)
        assert mixed.size <= limit
        mixtures += len({4, 8} & set(mixed.weights.values())) > 1
        rise = predicted(goal, prices, mixed, model)
        for single in fits(model, goal):
            # Single types are cut to within one component, mixed ones to within one layer's step.
            assert rise <= 1.1 * predicted(goal, prices, single, model) + 1e-3
    assert mixtures > 0


def test_a_size_without_prices_of_rounding_is_none(text):
    model = tiny_llama()
    analysis = analyzed(model, LowRankConfig(megabytes=0.03), text[:6])
    assert mixed_plan(model, analysis, {}, 10_000) is None


def test_what_is_fixed_stays_and_its_type_is_free(text):
    model = tiny_llama()
    pattern = {"layers.0.*": None, "layers.1.self_attn.*": 5}
    config = LowRankConfig(megabytes=0.034, channels=True, rank_pattern=pattern)
    analysis = analyzed(model, config, text[:6])
    prices = rounding_prices(model, analysis)
    plan, bits = mixed_plan(model, analysis, prices, 34_000)
    assert all(rank is None for name, rank in plan.ranks.items() if "layers.0." in name)
    assert all(plan.ranks[name] == 5 for name in plan.ranks if "layers.1.self_attn" in name)
    assert not any("layers.0." in name for name in plan.narrowed)
    assert any("layers.0." in name for name in bits)


@pytest.mark.default_recipe
@FORMS
def test_a_mixed_checkpoint_is_loaded_and_replayed_bit_for_bit(form, text, tmp_path):
    model = tiny_llama()
    config = LowRankConfig(megabytes=0.036, form=form)
    report = compress(model, config, text[:4], held_out=text[4:8], progress=False)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 36_000
    found = report.quantization
    assert found.weights == "mixed"
    assert 0 < sum(found.groups.values()) < found.matrices
    assert len(quantized_modules(model)) == found.matrices
    assert report.size_trials == []
    lines = format_report(report)
    assert f"{sum(found.groups.values())} int4, " in lines
    expected = logits(model, text[0])
    assert torch.equal(logits(hf_lowrank.load(tmp_path), text[0]), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), text[0]), expected)
    decided = model.config.quantization_config
    assert decided.weights is None
    again = tiny_llama()
    compress(again, decided, text[:4], progress=False)
    assert torch.equal(logits(again, text[0]), expected)


def test_nothing_is_measured_where_there_are_prices(text, monkeypatch):
    monkeypatch.setattr(byte_budget.HeldOutLoss, "compare", pytest.fail)
    model = tiny_llama()
    report = compress(model, LowRankConfig(megabytes=0.04), text[:4], progress=False)
    assert report.quantization.weights == "mixed"
    assert report.size_trials == []


def test_a_size_that_holds_the_model_as_it_is_changes_nothing(text):
    model = tiny_llama()
    before = logits(model, text[0])
    report = compress(model, LowRankConfig(megabytes=1), text[:4], progress=False)
    assert report.quantization is None
    assert report.parameters.targeted_share == 1
    assert torch.equal(logits(model, text[0]), before)

"""Fused experts that lose channels or whole experts: what stays the same, and what goes first."""

import dataclasses
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import hf_lowrank
from hf_lowrank import LowRankConfig, compress, merge, sweep
from hf_lowrank.channels.expert_order import of_experts
from hf_lowrank.compression import expert_analysis
from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.options import Run, Texts
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.fused_experts import ChannelView, experts_shape, small_experts
from hf_lowrank.modeling import expert_targets
from hf_lowrank.modeling.expert_targets import experts_of, qualified_experts
from hf_lowrank.modeling.surgery import factorized
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.card.card_parts import channel_note
from hf_lowrank.report.layers import expert_rows
from hf_lowrank.report.schema import Report
from hf_lowrank.report.text.table import format_report
from tests.compression import mean_loss
from tests.tiny_mixtures import CHOSEN, EXPERTS, MIXTURES, WIDTH, gpt_oss, mixtral, qwen3_moe
from tests.tiny_models import equal_states, logits, snapshot, token_batches, written_batches

CONFIG = LowRankConfig(param_ratio=0.6, channels=True)
BATCHES = token_batches(4)
NAME = "model.layers.1.mlp.experts"


@pytest.fixture(params=MIXTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return MIXTURES[request.param]()


def ordered(model: Any, config: LowRankConfig = CONFIG, batches: Any = BATCHES) -> Any:
    """The orders of a model's experts, and the analysis that they are in."""
    found = qualified_experts(model, config, batches[0])
    assert not found.left_dense
    run = Run(Texts(batches), expert_run_options(), experts=found.routers)
    analysis = analyze(model, find_targets(model, config), config, run)
    return of_experts(analysis.orders), analysis


def expert_run_options() -> Any:
    return dataclasses.replace(Run().options, progress=False)


def plan_of(analysis: Any, experts: dict[str, Any]) -> RankPlan:
    return RankPlan(dict.fromkeys(analysis.shapes), analysis.shapes, experts=experts)


def test_all_channels_kept_give_equal_logits_and_fewer_experts_others(model: Any):
    orders, analysis = ordered(model)
    before = logits(model, BATCHES[0])
    whole = {name: each.plan(*each.dense) for name, each in orders.items()}
    with factorized(model, {}, plan_of(analysis, whole), orders):
        assert not small_experts(model)
    experts, width = orders[NAME].dense
    fewer = {NAME: orders[NAME].plan(experts - 1, width)}
    with factorized(model, {}, plan_of(analysis, fewer), orders):
        module = model.get_submodule(NAME)
        assert experts_shape(module).size.experts == module.num_experts == experts - 1
        kept = orders[NAME].kept(fewer[NAME])
        assert kept.tolist() == sorted(kept.tolist())
        assert (logits(model, BATCHES[0]) - before).abs().max() > 1e-3
    assert torch.equal(logits(model, BATCHES[0]), before)


def test_channels_without_weight_cost_nothing_and_go_first(model: Any):
    view, gone = ChannelView.of(model.get_submodule(NAME)), []
    count, _, width = view.out.shape
    left = (width // 2 + 7) // 8 * 8
    for expert in range(count):  # each has others
        gone.append(torch.randperm(width, generator=torch.Generator().manual_seed(expert))[left:])
        view.into[expert][:, gone[-1]] = 0
        view.out[expert][:, gone[-1]] = 0
        if view.bias is not None:
            view.bias[expert][:, gone[-1]] = 0
    orders, analysis = ordered(model)
    order = orders[NAME]
    step = order.counts.index(left)
    assert float(order.narrower[:, step].sum()) < 1e-3 * float(order.narrower[:, 0].sum())
    for kept, lost in zip(order.order[:, :left], gone, strict=True):
        assert not set(kept.tolist()) & set(lost.tolist())
    before = logits(model, BATCHES[0])
    plan = {NAME: order.plan(count, left)}
    with factorized(model, {}, plan_of(analysis, plan), orders):
        assert torch.allclose(logits(model, BATCHES[0]), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_an_expert_that_nobody_is_sent_to_costs_nothing(name: str):
    model = MIXTURES[name]()
    router = model.model.layers[1].mlp
    router = router.router if name == "gpt_oss" else router.gate
    with torch.no_grad():
        (router.bias if name == "gpt_oss" else router.e_score_correction_bias)[3] = -100.0
    orders, analysis = ordered(model)
    assert float(orders[NAME].drops[3]) == 0
    assert float(orders[NAME].drops.sort().values[1]) > 0
    before = logits(model, BATCHES[0])
    fewer = orders[NAME].plan(EXPERTS - 1, WIDTH)
    assert 3 not in orders[NAME].kept(fewer)
    with factorized(model, {}, plan_of(analysis, {NAME: fewer}), orders):
        found = logits(model, BATCHES[0])  # other sizes, other rounding
        assert torch.allclose(found, before, rtol=1e-5, atol=1e-5)


def test_a_price_of_a_dropped_expert_is_that_of_what_its_tokens_lose():
    """Half the mean square of gradient times change, were both known token by token."""
    model = mixtral()
    batches = token_batches(1, batch_size=8, length=32)
    orders, _ = ordered(model, CONFIG.replace(output_damping=0.0), batches)
    prices = orders[NAME].drops
    module, block = model.get_submodule(NAME), model.model.layers[1].mlp
    seen: dict[str, torch.Tensor] = {}

    def keep(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen["tokens"], seen["index"], seen["output"] = args[0], args[1], output
        output.retain_grad()
        return output

    handle = module.register_forward_hook(keep)
    tokens = batches[0]["input_ids"]
    found = model(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(found.mT, tokens[:, 1:], reduction="sum").backward()
    handle.remove()
    gradient, scored = seen["output"].grad, tokens[:, 1:].numel()
    exact = []
    for expert in range(EXPERTS):
        rows = (seen["index"] == expert).any(dim=1)
        probabilities = torch.softmax(block.gate.weight @ seen["tokens"][rows].T, dim=0)
        probabilities[expert] = 0
        weights, index = probabilities.T.topk(CHOSEN)
        weights = weights / weights.sum(dim=1, keepdim=True)
        with torch.no_grad():
            change = module(seen["tokens"][rows], index, weights) - seen["output"][rows]
        both = (gradient[rows] @ change.T).square().sum() / (2 * rows.sum() * scored)
        exact.append(float(both))
    shrunk = torch.tensor(exact, dtype=torch.float64)
    tokens_of = torch.stack([(seen["index"] == e).any(dim=1).sum() for e in range(EXPERTS)])
    mean = shrunk.sum() / tokens_of.sum()
    shrunk = tokens_of * (shrunk + 16 * mean) / (tokens_of + 16)
    assert torch.allclose(prices, shrunk, rtol=1e-3)


def test_an_expert_with_few_tokens_leans_on_its_layer():
    model = qwen3_moe()
    routers = qualified_experts(model, CONFIG, BATCHES[0]).routers
    layers = experts_of(model, routers)
    found = expert_analysis.collect_expert_moments(
        model, layers, BATCHES, hf_lowrank.measuring.losses.item_losses
    )
    moments = found[NAME]
    assert moments.tokens.sum() == CHOSEN * sum(b["input_ids"].numel() for b in BATCHES)
    own = moments.channels[0] / moments.tokens[0]
    layer = moments.spread[0] / moments.spread_tokens[0]
    few, many = (dataclasses.replace(moments, tokens=moments.tokens.clone()) for _ in range(2))
    for each, count in ((few, 1.0), (many, 1e7)):
        each.channels = own.expand_as(moments.channels) * count
        each.tokens[:] = count
    assert torch.allclose(expert_analysis._channel_mean(many, 0).float(), own, atol=1e-4)
    near = expert_analysis._channel_mean(few, 0).float()
    assert (near - layer).norm() < 0.1 * (own - layer).norm()


def test_padding_is_no_token_of_any_expert():
    padded = token_batches(2, padding=5)
    model = mixtral()
    layers = experts_of(model, qualified_experts(model, CONFIG, padded[0]).routers)
    found = expert_analysis.collect_expert_moments(
        model, layers, padded, hf_lowrank.measuring.losses.item_losses
    )
    counted = sum(int(batch["attention_mask"].sum()) for batch in padded)
    assert found[NAME].tokens.sum() == CHOSEN * counted


def test_the_budget_counts_experts_and_is_met(model: Any):
    dense = snapshot(model)
    report = compress(model, CONFIG, BATCHES, progress=False)
    kept = report.parameters
    assert kept.targeted_kept <= 0.6 * kept.targeted_dense
    left = {name: experts_shape(model.get_submodule(name)) for name in report.experts}
    held = sum(
        parameter.numel()
        for name in left
        for parameter in model.get_submodule(name).parameters()
        if parameter.ndim == 3
    )
    assert held == sum(each.kept_parameters for each in report.experts.values())
    assert held < sum(each.dense_parameters for each in report.experts.values())
    fused = sum(v.numel() for k, v in dense.items() if k.rpartition(".")[0] in left and v.ndim == 3)
    assert fused == sum(each.dense_parameters for each in report.experts.values())
    for name, shape in left.items():
        assert (shape.size.experts, shape.size.width) == (
            report.experts[name].experts,
            report.experts[name].width,
        )
    assert not any("experts." in name for name in report.untouched)
    assert torch.isfinite(logits(model, BATCHES[0])).all()


def test_the_report_shows_what_is_left(tmp_path: Any):
    model = gpt_oss()
    report = compress(model, CONFIG, BATCHES, progress=False)
    header, row = expert_rows(report)
    assert row[:3] == ["mlp.experts", "2", str(EXPERTS)]
    assert len(header) == len(row)
    assert "mlp.experts" in format_report(report)
    assert "Some experts have fewer channels" in channel_note(report)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").experts == report.experts


def test_a_sweep_ends_dense_and_prices_are_measured():
    model = mixtral()
    before, text = snapshot(model), written_batches(model, 6)
    config = CONFIG.replace(measured_prices=True)
    for report in sweep(model, config, [0.8, 0.5], text, progress=False):
        assert small_experts(model)
        assert report.config.measured_prices
        assert report.predicted_loss_difference > 0
    assert not small_experts(model)
    assert equal_states(snapshot(model), before)


def test_a_tolerance_is_met_by_experts_too():
    model, dense = mixtral(), mixtral()
    text = written_batches(dense, 10)
    config = LowRankConfig(loss_tolerance=0.05, channels=True)
    report = compress(model, config, text[:6], held_out=text[6:], progress=False)
    assert mean_loss(model, text[6:]) - mean_loss(dense, text[6:]) <= 0.05
    assert any(each.is_cut for each in report.experts.values())


def test_a_config_is_replayed_and_a_cache_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    model, again = qwen3_moe(), qwen3_moe()
    compress(model, CONFIG, BATCHES, cache_dir=tmp_path, progress=False)
    calls: list[str] = []
    monkeypatch.setattr(expert_analysis, "collect_expert_moments", lambda *a, **k: calls.append(""))
    config = model.config.quantization_config
    assert config.format_version == 3
    compress(again, config, BATCHES, cache_dir=tmp_path, progress=False)
    assert not calls
    assert equal_states(snapshot(again), snapshot(model))
    odd = config.replace(experts={"x": {"experts": 1, "width": 8}})
    with pytest.raises(ConfigError, match="x: the config says what is left of its experts"):
        compress(qwen3_moe(), odd, BATCHES, cache_dir=tmp_path, progress=False)


def test_merging_gives_full_width_and_refuses_dropped_experts(model: Any):
    orders, _ = ordered(model)
    experts, width = orders[NAME].dense
    before = dict(vars(model.get_submodule(NAME)))
    narrow = orders[NAME].smaller(model, orders[NAME].plan(experts, orders[NAME].counts[1]))
    model.set_submodule(NAME, narrow[NAME])
    expected = logits(model, BATCHES[0])
    merge(model)
    assert experts_shape(model.get_submodule(NAME)).size.width == width
    assert vars(model.get_submodule(NAME)).keys() == before.keys()
    assert torch.allclose(logits(model, BATCHES[0]), expected, rtol=1e-4, atol=1e-4)
    fewer = orders[NAME].smaller(model, orders[NAME].plan(experts - 1, width))
    for name, module in fewer.items():
        model.set_submodule(name, module)
    with pytest.raises(TargetError, match=f"{experts - 1} of {experts} experts are left, and no"):
        merge(model)
    with pytest.raises(TargetError, match="already compressed"):
        find_targets(model, CONFIG)


def test_experts_that_accelerate_placed_are_taken():
    model, plain = mixtral(), mixtral()
    for each in model.modules():
        add_hook_to_module(each, AlignDevicesHook("cpu"))
    report = compress(model, CONFIG, BATCHES, progress=False)
    assert report.experts.keys() == compress(plain, CONFIG, BATCHES, progress=False).experts.keys()
    assert torch.equal(logits(model, BATCHES[0]), logits(plain, BATCHES[0]))


def test_megabytes_may_be_had_from_experts(tmp_path: Any):
    model, text = mixtral(), BATCHES
    model.save_pretrained(tmp_path / "dense")
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size / 1e6
    config = LowRankConfig(megabytes=0.45 * size, channels=True, form="compact")
    config = config.replace(measured_prices=False)
    report = compress(model, config, text[:2], held_out=text[2:], progress=False)
    assert any(each.is_cut for each in report.experts.values())
    model.save_pretrained(tmp_path / "small")
    assert (tmp_path / "small" / "model.safetensors").stat().st_size <= 0.45 * size * 1e6
    with pytest.raises(ConfigError, match="is too small: with the smallest ranks"):
        compress(mixtral(), config.replace(megabytes=0.02), text[:2], held_out=text[2:])


def test_experts_are_left_alone_without_channels_or_where_excluded():
    report = compress(mixtral(), CONFIG.replace(channels=False), BATCHES, progress=False)
    assert not report.experts
    assert any(name.startswith(NAME) for name in report.untouched)
    config = CONFIG.replace(exclude_modules=["layers.1.mlp.experts"])
    report = compress(mixtral(), config, BATCHES, progress=False)
    assert report.experts.keys() == {"model.layers.0.mlp.experts"}


class Normed(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows / rows.norm(dim=-1, keepdim=True)


REASONS = {
    "computes something else than its experts one by one": lambda m: setattr(m, "has_gate", False),
    "channels do not act one by one": lambda m: setattr(m, "act_fn", Normed()),
    "does not say how it lays out": lambda m: delattr(m, "is_concatenated"),
    "its forward method was replaced": lambda m: setattr(m, "forward", m.forward),
    "holds more than its experts' weights": lambda m: setattr(m, "own", torch.nn.Linear(2, 2)),
    "its weights are on the meta device": lambda m: m.half().to("meta"),
}


@pytest.mark.parametrize(
    "reason", [r for r in REASONS if "meta" not in r and "one by one" in r[:99]]
)
def test_experts_that_compute_something_else_are_left_by_name(reason: str):
    model = mixtral()
    module = model.get_submodule(NAME)
    if "computes" in reason:
        forward = type(module).forward
        odd = type("Odd", (type(module),), {"forward": lambda s, *a: 2 * forward(s, *a)})
        module.__class__ = odd
    else:
        REASONS[reason](module)
    found = qualified_experts(model, CONFIG, BATCHES[0])
    assert reason in found.left_dense[NAME]
    assert found.routers.keys() == {"model.layers.0.mlp.experts"}


@pytest.mark.parametrize("reason", [r for r in REASONS if "one by one" not in r])
def test_experts_of_another_make_are_left_by_name(reason: str):
    module = mixtral().get_submodule(NAME)
    REASONS[reason](module)
    assert reason in str(expert_targets._odd(module))


def test_experts_of_another_make_are_reported():
    model = mixtral()
    delattr(model.get_submodule(NAME), "is_concatenated")
    report = compress(model, CONFIG, BATCHES, progress=False)
    assert "does not say how" in report.failures[NAME]
    assert any(name.startswith(NAME) for name in report.untouched)
    assert report.experts.keys() == {"model.layers.0.mlp.experts"}

"""Whole runs that let feed-forwards lose channels."""

import pytest
import torch
from torch import nn

from hf_lowrank import LowRankConfig, compress, get_lowrank_model, merge, sweep
from hf_lowrank.channels import order as order_module
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.cli.arguments import CompressionArguments
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.feed_forward import FeedForward, find_feed_forwards
from hf_lowrank.format.forms.narrowed import NarrowedLinear
from hf_lowrank.format.rebuild import narrowed_layers
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.layers import kept_shares
from hf_lowrank.report.page.page import report_page
from hf_lowrank.report.text.table import comparison_rows, describe_run, format_report, rank_rows
from tests.compression import DRY, CountingLoss, mean_loss
from tests.tiny_models import (
    TINY_MODELS,
    batches_for,
    equal_states,
    logits,
    num_lowrank,
    snapshot,
    tiny_llama,
    written_batches,
)

CONFIG = LowRankConfig(param_ratio=0.5, channels=True)


@pytest.fixture(scope="module")
def text():
    return written_batches(tiny_llama(), num_batches=10)


def repeating():
    """A model whose last third of channels repeats others, so that they can go."""
    model = tiny_llama(intermediate_size=48)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[32:] = layer.mlp.gate_proj.weight[:16]
            layer.mlp.up_proj.weight[32:] = layer.mlp.up_proj.weight[:16]
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "opt"])
def test_the_budget_is_met_by_what_the_model_holds(name):
    model = TINY_MODELS[name]()
    batches = batches_for(model, 3)
    targets = find_targets(model, CONFIG)
    dense = sum(m * n for m, n in map(linear_shape, targets.values()))
    report = compress(model, CONFIG, batches, progress=False)
    weights = [p for n in targets for p in model.get_submodule(n).parameters() if p.ndim == 2]
    assert sum(weight.numel() for weight in weights) == report.parameters.targeted_kept
    assert 0.49 * dense < report.parameters.targeted_kept <= 0.5 * dense
    assert report.parameters.targeted_dense == dense
    assert set(report.narrowed) == set(narrowed_layers(model))
    assert report.narrowed
    for layer_name, layer in narrowed_layers(model).items():
        assert report.narrowed[layer_name] == tuple(layer.weight.shape)
        assert report.ranks[layer_name] is None
    assert torch.isfinite(logits(model, batches[0])).all()


def test_channels_that_others_rebuild_go_first_and_nothing_is_lost(text):
    model, dense = repeating(), repeating()
    config = LowRankConfig(param_ratio=0.82, channels=True, input_damping=1e-8)
    report = compress(model, config, text[:8], progress=False)
    assert abs(mean_loss(model, text[8:]) - mean_loss(dense, text[8:])) < 2e-3
    assert report.predicted_loss_difference < 2e-3
    ranks_only = repeating()
    compress(ranks_only, LowRankConfig(param_ratio=0.82), text[:8], progress=False)
    assert mean_loss(ranks_only, text[8:]) - mean_loss(dense, text[8:]) > 0.02


def test_layers_fixed_by_hand_keep_their_feed_forward(text):
    config = CONFIG.replace(rank_pattern={"layers.0.mlp.up_proj": 9, "layers.1.mlp.up_proj": None})
    model = tiny_llama()
    report = compress(model, config, text[:2], progress=False)
    assert not report.narrowed
    assert report.ranks["model.layers.0.mlp.up_proj"] == 9
    config = CONFIG.replace(exclude_modules=["layers.0.mlp.up_proj"])
    report = compress(tiny_llama(), config, text[:2], progress=False)
    assert {name.split(".")[2] for name in report.narrowed} == {"1"}


def test_a_tolerance_is_searched_over_channels_too(text):
    model, dense = repeating(), repeating()
    config = LowRankConfig(loss_tolerance=0.01, channels=True, input_damping=1e-8)
    report = compress(model, config, text[:6], held_out=text[6:], progress=False)
    rise = mean_loss(model, text[6:]) - mean_loss(dense, text[6:])
    assert rise <= 0.01
    assert report.held_out.mean == pytest.approx(rise, abs=1e-5)
    assert report.narrowed
    ranks_only = compress(
        repeating(), config.replace(channels=False), text[:6], held_out=text[6:], progress=False
    )
    assert report.parameters.targeted_kept < 0.9 * ranks_only.parameters.targeted_kept


def test_a_sweep_ends_dense(text):
    model = tiny_llama()
    before = snapshot(model)
    kept = []
    for report in sweep(model, CONFIG, [0.7, 0.4], text[:2], progress=False):
        kept.append(report.parameters.targeted_kept / report.parameters.targeted_dense)
        assert narrowed_layers(model)
    assert kept == [pytest.approx(0.7, abs=0.02), pytest.approx(0.4, abs=0.02)]
    assert not narrowed_layers(model)
    assert equal_states(snapshot(model), before)


def test_a_config_is_replayed(text):
    model, again = tiny_llama(), tiny_llama()
    compress(model, CONFIG, text[:2], progress=False)
    compress(again, model.config.quantization_config, text[:2], progress=False)
    assert equal_states(snapshot(again), snapshot(model))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda shapes: shapes["up"].__setitem__(0, 5), "does not fit that of .*down_proj"),
        (lambda shapes: shapes.pop("up"), "up_proj: the plan gives it shape None"),
        (lambda shapes: shapes.pop("down"), "its channels were not ordered"),
    ],
)
def test_a_replay_that_does_not_fit_is_refused_before_the_first_edit(text, edit, message):
    model = tiny_llama()
    compress(model, CONFIG, text[:2], progress=False)
    config = model.config.quantization_config
    prefix = "model.layers.1.mlp"
    shapes = {kind: config.narrowed.pop(f"{prefix}.{kind}_proj") for kind in ("gate", "up", "down")}
    edit(shapes)
    config.narrowed |= {f"{prefix}.{kind}_proj": shape for kind, shape in shapes.items()}
    again = tiny_llama()
    before = snapshot(again)
    with pytest.raises(TargetError, match=message):
        compress(again, config, text[:2], progress=False)
    assert equal_states(snapshot(again), before)
    with pytest.raises(ConfigError, match="set channels=True"):
        compress(again, config.replace(channels=False), text[:2], progress=False)


@pytest.mark.parametrize("fixed", [{}, {"q_proj": 14}])
def test_channels_that_nothing_reads_stay_where_nothing_has_to_go(text, fixed):
    def build():
        model = tiny_llama()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight[:, ::3] = 0
        return model

    config = LowRankConfig(param_ratio=1.0, channels=True, rank_pattern=fixed)
    report = compress(build(), config, text[:4], progress=False)
    assert report.narrowed == {}
    config = config.replace(param_ratio=None, loss_tolerance=0.5)
    report = compress(build(), config, text[:4], held_out=text[4:], progress=False)
    assert report.narrowed
    assert report.probes


def test_channels_from_another_device_move_to_the_weights(monkeypatch):
    """As after a run whose channels came from the cache, on a GPU."""
    seen = []
    monkeypatch.setattr(order_module, "refit", lambda *tensors: seen.extend(tensors))
    model = nn.Module()
    model.fc1, model.fc2 = nn.Linear(4, 8, device="meta"), nn.Linear(8, 4, device="meta")
    block = FeedForward(("fc1",), "fc2")
    order = ChannelOrder(block, torch.arange(8), [8], torch.zeros(1), torch.eye(8))
    order.narrowing(model, 5)
    kept, weights, moment = seen
    assert {kept.device.type, weights.output.device.type, moment.device.type} == {"meta"}


def test_merging_gives_the_full_width_back(text):
    for build in (tiny_llama, TINY_MODELS["gpt2"]):
        model = build()
        compress(model, CONFIG, text[:2], progress=False)
        expected = logits(model, text[0])
        merge(model)
        torch.testing.assert_close(logits(model, text[0]), expected, rtol=1e-4, atol=1e-5)
        assert num_lowrank(model) == 0
        assert [
            k for k, v in model.state_dict().items() if v.shape != build().state_dict()[k].shape
        ] == []
        assert [type(m) for m in model.modules()] == [type(m) for m in build().modules()]


def test_a_compressed_model_is_refused_and_trains(text):
    model = get_lowrank_model(tiny_llama(), CONFIG, text[:2], progress=False)
    with pytest.raises(TargetError, match="already compressed"):
        compress(model, CONFIG, text[:2], progress=False)
    layer = next(iter(narrowed_layers(model).values()))
    model(**text[0], labels=text[0]["input_ids"]).loss.backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("kind", ["factors", "lora"])
def test_recovery_trains_the_narrowed_layers(text, kind):
    def run(steps):
        model = tiny_llama()
        found = compress(
            model,
            CONFIG.replace(param_ratio=0.35),
            text[:6],
            held_out=text[6:],
            recover_steps=steps,
            recover=kind if steps else None,
            progress=False,
        )
        return model, found.recovery

    (model, recovery), (cut, _) = run(20), run(0)
    assert recovery.accepted
    assert recovery.loss_after < recovery.loss_before
    before, after = narrowed_layers(cut), narrowed_layers(model)
    assert all(type(layer) is NarrowedLinear for layer in after.values())
    assert all(not torch.equal(after[name].weight, before[name].weight) for name in before)


def test_a_cache_holds_channels_too(text, tmp_path):
    results = []
    for _ in range(2):
        model, loss = tiny_llama(), CountingLoss()
        compress(model, CONFIG, text[:3], loss_function=loss, cache_dir=tmp_path, progress=False)
        results.append((snapshot(model), loss.calls))
    assert [calls for _, calls in results] == [3 + DRY, DRY]
    assert equal_states(results[0][0], results[1][0])
    for path in tmp_path.glob("channels-*"):
        path.unlink()
    loss = CountingLoss()
    model = tiny_llama()
    compress(model, CONFIG, text[:3], loss_function=loss, cache_dir=tmp_path, progress=False)
    assert loss.calls == DRY  # from the moments
    assert equal_states(snapshot(model), results[0][0])


def test_passes_in_groups_give_the_same_channels(text):
    one, several = tiny_llama(), tiny_llama()
    loss = CountingLoss()
    compress(one, CONFIG, text[:2], progress=False)
    compress(
        several, CONFIG, text[:2], loss_function=loss, moment_gib=30_000 / 2**30, progress=False
    )
    assert loss.calls > 2
    for name, tensor in snapshot(one).items():
        torch.testing.assert_close(snapshot(several)[name], tensor)


def test_reports_show_channels(text):
    report = compress(tiny_llama(), CONFIG, text[:2], text[2:3], progress=False)
    shares = kept_shares(report)
    kept = sum(
        shares[name] * m * n for name, (m, n) in ((k, v.shape) for k, v in report.spectra.items())
    )
    assert kept == pytest.approx(report.parameters.targeted_kept)
    header, *rows = rank_rows(report)
    assert header[-4:] == ["narrowed", "fewest channels", "mean channels", "most channels"]
    found = {row[0]: row for row in rows}
    counts = [
        report.narrowed[f"model.layers.{i}.mlp.up_proj"][0]
        for i in range(2)
        if f"model.layers.{i}.mlp.up_proj" in report.narrowed
    ]
    assert found["up_proj"][-4:] == [
        str(len(counts)),
        str(min(counts)),
        f"{sum(counts) / len(counts):.1f}",
        str(max(counts)),
    ]
    assert found["down_proj"][-4:] == found["up_proj"][-4:]
    assert found["q_proj"][-4:] == ["0", "-", "-", "-"]
    assert "most channels" in format_report(report)
    assert describe_run(report).endswith(
        "Ranks, and channels of feed-forwards, by metric kfac; seed 0."
    )
    assert comparison_rows({"a": report})[1][8] == "kfac, channels"
    page = report_page(report)
    shape = report.narrowed["model.layers.1.mlp.down_proj"]
    assert f"{shape[0]} x {shape[1]}" in page
    assert "fewer outputs x inputs" in page


def test_other_uses_are_refused(text):
    with pytest.raises(ConfigError, match="Joint compression takes neither channels"):
        compress_jointly(tiny_llama(), CONFIG, text[:2], text[2:4])
    model = TINY_MODELS["phi3"]()
    with pytest.raises(TargetError, match="no feed-forward of a known kind"):
        compress(model, CONFIG, batches_for(model, 2), progress=False)
    assert num_lowrank(model) == 0


def test_feed_forwards_are_named_by_their_layers():
    model = tiny_llama()
    blocks = find_feed_forwards(model, find_targets(model, CONFIG))
    assert [block.output for block in blocks] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def test_the_command_line_has_the_option():
    assert CompressionArguments(param_ratio=[0.5], channels=True).to_config().channels
    with pytest.raises(ConfigError, match="joint takes neither channels nor measured_prices"):
        CompressionArguments(param_ratio=[0.5], channels=True, joint=True).to_config()
    with pytest.raises(ConfigError, match="channels works on prices"):
        CompressionArguments(param_ratio=[0.5], channels=True, metric="whitened").to_config()

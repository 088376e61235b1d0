"""Compression in stages: what each stage starts from, and what a failure leaves."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from hf_lowrank import LowRankConfig, compress, sweep
from hf_lowrank.cli.arguments import CompressionArguments
from hf_lowrank.compression import application
from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.application import cut_, measure_dense
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.compression.prices import model_parts
from hf_lowrank.compression.recovery import RecoverySettings, recover_
from hf_lowrank.compression.stages import stage_goals
from hf_lowrank.errors import ConfigError, NumericalError
from hf_lowrank.format.rebuild import compressed_layers
from hf_lowrank.format.strict import load
from hf_lowrank.modeling.surgery import factorize_, merge_
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.card.text_card import _limits
from hf_lowrank.report.schema import Report
from hf_lowrank.report.text.table import comparison_rows, describe_run, format_report
from tests.compression import mean_loss
from tests.compression.analyzed import analyzed, quiet_run
from tests.tiny_models import equal_states, snapshot, tiny_gpt2, tiny_llama, written_batches

CONFIG = LowRankConfig(param_ratio=0.5, channels=True, measured_prices=True)
OPTIONS = {"recover_steps": 6, "stages": 2, "progress": False}


@pytest.fixture(scope="module")
def text():
    return written_batches(tiny_llama(), num_batches=12)


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test when long work begins."""
    monkeypatch.setattr(
        "hf_lowrank.compression.application.analyze", lambda *a, **k: pytest.fail("worked")
    )


@pytest.fixture(autouse=True)
def priced_on_held_out_text(monkeypatch):
    """On so few tokens it is chance which plan does better; these tests are about stages."""
    monkeypatch.setattr("hf_lowrank.compression.decision._is_better", lambda *arguments: False)


def compress_twice(model, text, kind="factors"):
    """Two stages by hand: cut, train towards the dense model, merge, cut again, train again."""
    dense = find_targets(model, CONFIG)
    for ratio, steps in ((0.75, 2), (0.5, 4)):
        if compressed_layers(model):
            merge_(model)
        analysis = analyzed(model, CONFIG, text[:6], held_out=text[6:9])
        plan = analysis.plan_for_ratio(ratio)
        analysis, _ = analysis.priced(plan, model_parts(model, plan.ranks))
        factorize_(model, analysis.factors, analysis.plan_for_ratio(ratio), analysis.orders)
        settings = RecoverySettings(steps, kind=kind)
        recover_(model, dense, text[:6], text[6:9], settings, progress=False)
    return model


def test_other_layers_and_lora_are_staged_alike(text):
    model = tiny_gpt2()
    text = written_batches(model, 9)
    before = torch.get_rng_state()
    report = compress(model, CONFIG, text[:6], held_out=text[6:9], recover="lora", **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal_states(
        model.state_dict(), compress_twice(tiny_gpt2(), text, kind="lora").state_dict()
    )
    assert [stage.recovery.kind for stage in report.stages] == ["lora", "lora"]


def test_speed_is_compared_with_the_dense_layers(text, monkeypatch):
    model, calls = tiny_llama(), []
    dense = find_targets(model, CONFIG)

    def time_both(model, originals):
        calls.append(dict(originals))

    monkeypatch.setattr("hf_lowrank.compression.application.speed_before_and_after", time_both)
    compress(model, CONFIG, text[:6], held_out=text[6:9], speed=True, **OPTIONS)
    assert calls == [dense]


def test_only_the_analysis_at_hand_is_in_memory(text, monkeypatch):
    alive, found = [], []

    def note(*args, **kwargs):
        gc.collect()
        alive.append(sum(each() is not None for each in found))
        result = analyze(*args, **kwargs)
        found.append(weakref.ref(result))
        return result

    monkeypatch.setattr("hf_lowrank.compression.application.analyze", note)
    options = OPTIONS | {"stages": 3}
    compress(tiny_llama(), CONFIG, text[:6], held_out=text[6:9], **options)
    assert alive == [0, 0, 0]


def test_stages_are_cuts_with_training_and_new_moments_in_between(text):
    model = tiny_llama()
    report = compress(model, CONFIG, text[:6], text[9:], held_out=text[6:9], **OPTIONS)
    assert equal_states(model.state_dict(), compress_twice(tiny_llama(), text).state_dict())
    parameters, found = report.parameters, report.evaluation
    assert parameters.targeted_kept <= 0.5 * parameters.targeted_dense
    assert parameters.dense == sum(p.numel() for p in tiny_llama().parameters())
    assert found.loss_before == pytest.approx(mean_loss(tiny_llama(), text[9:]), rel=1e-5)
    assert found.loss_after == pytest.approx(mean_loss(model, text[9:]), rel=1e-5)
    assert [stage.param_ratio for stage in report.stages] == [0.75, 0.5]
    assert [stage.recovery.steps for stage in report.stages] == [2, 4]
    assert report.stages[-1].recovery == report.recovery
    assert all(stage.predicted_loss_difference > 0 for stage in report.stages)
    assert report.predicted_loss_difference is None
    assert describe_run(report).startswith(
        "Goal: at most 50.0% of the targeted layers' weights kept, in 2 stages."
    )
    assert "After each cut 2 and 4 steps of training" in describe_run(report)
    assert comparison_rows({"a": report})[1][8].endswith("6 steps of recovery, 2 stages")
    assert "was also trained on the calibration text" in " ".join(_limits(report))
    assert all(stage.measured_prices for stage in report.stages)
    assert "recovery at 0.75, 2 steps: held-out loss" in format_report(report)
    assert "recovery at 0.5, 4 steps: held-out loss" in format_report(report)


def test_the_checkpoint_loads_and_the_report_is_read_again(text, tmp_path):
    model = tiny_llama()
    report = compress(model, CONFIG, text[:6], held_out=text[6:9], **OPTIONS)
    model.save_pretrained(tmp_path / "model")
    assert equal_states(load(tmp_path / "model").state_dict(), model.state_dict())
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").stages == report.stages
    for _ in ("written", "read"):
        cached = tiny_llama()
        options = OPTIONS | {"cache_dir": tmp_path / "cache"}
        compress(cached, CONFIG, text[:6], held_out=text[6:9], **options)
        assert equal_states(cached.state_dict(), model.state_dict())


def judged(stage, accepted):
    return replace(stage, recovery=replace(stage.recovery, accepted=accepted))


def test_a_training_that_was_not_kept_is_not_claimed(text):
    report = compress(tiny_llama(), CONFIG, text[:6], held_out=text[6:9], **OPTIONS)
    stages = report.stages
    report.stages = [judged(stages[0], False), judged(stages[1], True)]
    assert "After each cut 0 and 4 steps of training" in describe_run(report)
    assert "was also trained" in " ".join(_limits(report))
    report.stages = [judged(stage, False) for stage in stages]
    assert "steps of" not in describe_run(report) + comparison_rows({"a": report})[1][8]
    assert "was also trained" not in " ".join(_limits(report))


def test_seconds_are_those_of_all_stages(text, monkeypatch):
    spent = []
    original = application.apply_

    def apply(*arguments):
        report = original(*arguments)
        spent.append(dict(report.seconds))
        return report

    monkeypatch.setattr(application, "apply_", apply)
    report = compress(tiny_llama(), CONFIG, text[:6], held_out=text[6:9], **OPTIONS)
    first, both = spent
    for phase in ("statistics", "decomposition", "recovery"):
        assert report.seconds[phase] == both[phase] > first[phase] > 0


def test_the_whole_budget_leaves_every_layer_dense(text):
    model = tiny_llama()
    before = snapshot(model)
    config = LowRankConfig(param_ratio=1.0)
    report = compress(model, config, text[:6], held_out=text[6:9], **OPTIONS)
    assert set(report.ranks.values()) == {None}
    assert [stage.recovery.steps for stage in report.stages] == [0, 0]
    assert equal_states(model.state_dict(), before)


def test_goals_cut_evenly_and_train_longest_after_the_last_cut():
    assert stage_goals(0.4, 3, 60) == [
        (pytest.approx(0.8), 15),
        (pytest.approx(0.6), 15),
        (0.4, 30),
    ]
    assert stage_goals(0.8, 2, 10) == [(pytest.approx(0.9), 3), (0.8, 7)]
    assert stage_goals(0.6, 1, 10) == [(0.6, 10)]
    assert min(steps for _, steps in stage_goals(0.5, 4, 5)) == 1


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failure_leaves_the_dense_model(text, monkeypatch, fails_at):
    model = tiny_llama()
    before, layers = snapshot(model), find_targets(model, CONFIG)
    calls = 0
    original = application.apply_

    def apply(*arguments):
        nonlocal calls
        calls += 1
        report = original(*arguments)
        if calls == fails_at:
            raise NumericalError("no number")
        return report

    monkeypatch.setattr(application, "apply_", apply)
    with pytest.raises(NumericalError, match="no number"):
        compress(model, CONFIG, text[:6], held_out=text[6:9], **OPTIONS)
    assert calls == fails_at
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert find_targets(model, CONFIG) == layers
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (CONFIG, {"stages": 0}, "stages must be an integer >= 1, got 0"),
        (CONFIG, {"stages": 1.5}, "stages must be an integer >= 1, got 1.5"),
        (CONFIG, {"stages": 3}, "training after every cut: set recover_steps to at least 4"),
        (CONFIG.replace(ranks={"q": 1}), {"stages": 2}, "ranks are made again in one cut"),
        (LowRankConfig(loss_tolerance=0.1), {"stages": 2}, "stages need a size to reach"),
        (LowRankConfig(rank=4), {"stages": 2, "recover_steps": 9}, "stages need a size to reach"),
        (CONFIG.replace(objective="latency"), {"stages": 2}, "stages count parameters: leave out"),
    ],
)
def test_what_cannot_be_staged_is_refused(text, no_work, config, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compress(tiny_llama(), config, text[:6], held_out=text[6:9], progress=False, **options)


def test_other_verbs_and_the_command_line_refuse_stages(text):
    with pytest.raises(TypeError, match="stages"):
        list(sweep(tiny_llama(), CONFIG, [0.5], text, **OPTIONS))
    with pytest.raises(TypeError, match="stages"):
        compress_jointly(
            tiny_llama(), LowRankConfig(param_ratio=0.5), text[:6], text[6:9], stages=2
        )
    for arguments, sentence in (
        ({"param_ratio": [0.8, 0.6], "recover_steps": 9}, "stages lead to one size"),
        ({"param_ratio": [0.8]}, "set recover_steps to at least 3"),
        ({"param_ratio": [0.8], "joint": True}, "joint is one cut"),
        ({"loss_tolerance": 0.1, "recover_steps": 9}, "stages need a size to reach"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            CompressionArguments(stages=2, **arguments).to_config()


def test_a_budget_that_the_last_stage_cannot_meet_is_refused_first(text, no_work):
    with pytest.raises(ConfigError, match="param_ratio"):
        compress(tiny_llama(), CONFIG.replace(param_ratio=1e-4), text[:6], **OPTIONS)


def test_one_stage_is_the_plain_call(text):
    once = {"recover_steps": 4, "progress": False}
    model, plain = tiny_llama(), tiny_llama()
    report = compress(model, CONFIG, text[:6], held_out=text[6:9], stages=1, **once)
    run, targets = quiet_run(text[:6], text[6:9], recover_steps=4), find_targets(plain, CONFIG)
    cut_(plain, targets, CONFIG, measure_dense(plain, targets, run), run)
    assert report.stages == []
    assert equal_states(model.state_dict(), plain.state_dict())

"""The speed in the report of a run: of the right weights, in every kind of run, if asked."""

import dataclasses

import pytest

from hf_lowrank import LowRankConfig, compress, sweep
from hf_lowrank.compression import application
from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.application import measure_dense
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.compression.options import Run, RunOptions
from hf_lowrank.measuring.distributed import Processes
from hf_lowrank.modeling.targets import find_targets
from tests.compression import is_dense
from tests.tiny_models import (
    equal_states,
    sentence_batches,
    snapshot,
    tiny_bert_classifier,
    tiny_llama,
)

PLAIN = LowRankConfig(param_ratio=0.5, metric="plain")


@pytest.fixture
def timed(monkeypatch):
    """What was timed: the state of the compressed model and its dense layers, run by run."""
    calls = []

    def note(model, originals):
        calls.append((snapshot(model), dict(originals)))
        return {"call": len(calls)}

    monkeypatch.setattr(application, "speed_before_and_after", note)
    return calls


def test_a_run_is_timed_only_where_it_was_asked_for():
    found = {}
    for wanted in (False, True):
        model = tiny_llama()
        report = compress(model, PLAIN, speed=wanted, progress=False)
        found[wanted] = (report, snapshot(model))
    assert found[False][0].speed is None
    assert "speed" not in found[False][0].seconds
    report = found[True][0]
    assert report.speed.compressed.decode_tokens_per_second > 0
    assert report.seconds["speed"] >= sum(report.speed.dense.decode)
    assert equal_states(found[False][1], found[True][1])


def test_recovered_factors_are_what_is_timed(timed, text):
    model, dense = tiny_llama(), snapshot(tiny_llama())
    report = compress(
        model, PLAIN, text[:4], held_out=text[4:6], recover_steps=5, speed=True, progress=False
    )
    ((state, originals),) = timed
    cut = tiny_llama()
    compress(cut, PLAIN, progress=False)
    assert report.recovery.accepted
    assert equal_states(state, snapshot(model))
    assert not equal_states(state, snapshot(cut))
    for name, layer in originals.items():
        assert (layer.weight == dense[f"{name}.weight"]).all()


def test_every_size_of_a_sweep_is_timed_against_the_dense_model(timed):
    model = tiny_llama()
    dense = dict(model.named_modules())
    runs = sweep(model, PLAIN, [0.3, 0.6], speed=True, progress=False)
    assert [report.speed for report in runs] == [{"call": 1}, {"call": 2}]
    for _, originals in timed:
        assert originals
        assert all(layer is dense[name] for name, layer in originals.items())
    assert is_dense(model)


def test_joint_compression_is_timed(timed, text):
    model = tiny_llama()
    report = compress_jointly(
        model, LowRankConfig(param_ratio=0.6), text[:2], text[2:3], speed=True, progress=False
    )
    assert report.speed == {"call": 1}
    assert equal_states(timed[0][0], snapshot(model))


def test_an_encoder_and_a_model_that_stays_dense_have_no_speed(timed):
    config = LowRankConfig(param_ratio=0.5, metric="plain")
    encoder = compress(
        tiny_bert_classifier(), config, sentence_batches(2), speed=True, progress=False
    )
    dense = compress(tiny_llama(), config.replace(param_ratio=1.0), speed=True, progress=False)
    assert timed == []
    for report in (encoder, dense):
        assert report.speed is None
        assert "speed" not in report.seconds


def test_of_several_processes_only_the_first_is_timed_and_all_report_it(timed):
    class Second(Processes):
        def decide(self, value):
            assert value is None
            return {"call": "of the first"}

    model = tiny_llama()
    alone = Run(options=RunOptions(speed=True, progress=False))
    second = dataclasses.replace(alone, processes=Second(1, 2))
    targets = find_targets(model, PLAIN)
    decision = decide(model, analyze(model, targets, PLAIN, alone), alone)
    report = application.apply_(model, decision, measure_dense(model, targets, alone), second)
    assert report.speed == {"call": "of the first"}
    assert timed == []

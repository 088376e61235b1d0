"""A verb finishes or leaves the model as it was, whatever goes wrong and however late."""

import pytest

from hf_lowrank import LowRankConfig, compress, compress_jointly, sweep
from hf_lowrank.compression import application, decision, stages
from hf_lowrank.modeling.targets import find_targets
from tests.tiny_models import equal_states, snapshot, tiny_llama

CONFIG = LowRankConfig(param_ratio=0.5)
ERRORS = [RuntimeError, KeyboardInterrupt, MemoryError]
# What is called in each phase after the cut, in the module that calls it.
AFTER_THE_CUT = [
    "attach_config_",
    "recover_",
    "quantize_",
    "measure_loss",
    "speed_before_and_after",
    "Report",
]
SECOND_SIZE = {"attach_config_": 3, "measure_loss": 3}
OPTIONS = {"recover_steps": 2, "speed": True, "progress": False}


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """The timing is called where it would be; what it takes the time of is not the point here."""
    monkeypatch.setattr(application, "speed_before_and_after", lambda *args: None)


class Untouched:
    """A model and what it was before a verb."""

    def __init__(self) -> None:
        self.model = tiny_llama()
        self.layers = find_targets(self.model, CONFIG)
        self.state = snapshot(self.model)
        self.config = self.model.config.to_dict()
        self.trains = [p.requires_grad for p in self.model.parameters()]
        self.names = set(vars(self.model))

    def check(self) -> None:
        model = self.model
        assert equal_states(model.state_dict(), self.state)
        found = find_targets(model, CONFIG)
        assert all(found[name] is layer for name, layer in self.layers.items())
        assert model.config.to_dict() == self.config
        assert [p.requires_grad for p in model.parameters()] == self.trains
        assert all(p.grad is None for p in model.parameters())
        assert set(vars(model)) == self.names
        assert not model.training
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks
            assert not module._backward_pre_hooks


def failing(original, error, at=1):
    """The function, raising at a call; the calls before it go through."""
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            raise error("late")
        return original(*args, **kwargs)

    return call


def fail(monkeypatch, module, name, error, at=1):
    monkeypatch.setattr(module, name, failing(getattr(module, name), error, at))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        *((name, KeyboardInterrupt) for name in AFTER_THE_CUT),
        *(("measure_loss", error) for error in ERRORS if error is not KeyboardInterrupt),
    ],
)
def test_after_the_cut(text, monkeypatch, name, error):
    before = Untouched()
    # The dense model is measured first, the compressed one in the second call.
    fail(monkeypatch, application, name, error, at=2 if name == "measure_loss" else 1)
    cut, factorize_ = [], application.factorize_
    monkeypatch.setattr(application, "factorize_", lambda *a: cut.append(a) or factorize_(*a))
    with pytest.raises(error, match="late"):
        compress(before.model, CONFIG, text[:4], text[4:6], held_out=text[6:8], **OPTIONS)
    assert cut
    before.check()


@pytest.mark.parametrize("name", ["model_parts", "plan_for_goal", "search_tolerance"])
def test_before_the_cut(text, monkeypatch, name):
    before = Untouched()
    fail(monkeypatch, decision, name, KeyboardInterrupt)
    config = LowRankConfig(loss_tolerance=0.5, measured_prices=True)
    with pytest.raises(KeyboardInterrupt):
        compress(before.model, config, text[:4], held_out=text[6:8], progress=False)
    before.check()


def test_in_the_middle_of_a_measurement(text, monkeypatch):
    before = Untouched()
    forward, calls = type(before.model.model).forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(before.model.model), "forward", interrupted)
    config = LowRankConfig(loss_tolerance=0.5)
    with pytest.raises(KeyboardInterrupt):
        compress(before.model, config, text[:4], held_out=text[6:8], progress=False)
    monkeypatch.undo()
    before.check()


@pytest.mark.parametrize("name", AFTER_THE_CUT)
def test_a_sweep(text, monkeypatch, name):
    before = Untouched()
    # The marks come off between the two sizes; the dense model is measured once before.
    fail(monkeypatch, application, name, RuntimeError, SECOND_SIZE.get(name, 2))
    texts = {"evaluation": text[4:6], "held_out": text[6:8]}
    reports = sweep(before.model, CONFIG, [0.8, 0.5], text[:4], **texts, **OPTIONS)
    next(reports)
    with pytest.raises(RuntimeError, match="late"):
        next(reports)
    before.check()


def test_a_sweep_whose_reader_fails_or_leaves(text):
    before = Untouched()
    reports = sweep(before.model, CONFIG, [0.8, 0.5], text[:4], progress=False)
    next(reports)
    reports.close()
    before.check()


@pytest.mark.parametrize(
    ("module", "name", "at"), [(application, "recover_", 2), (stages, "merge_", 1)]
)
def test_stages(text, monkeypatch, module, name, at):
    before = Untouched()
    fail(monkeypatch, module, name, RuntimeError, at)
    options = OPTIONS | {"recover_steps": 6, "stages": 2}
    with pytest.raises(RuntimeError, match="late"):
        compress(before.model, CONFIG, text[:4], held_out=text[6:8], **options)
    before.check()


@pytest.mark.parametrize("name", ["attach_config_", "measure_loss", "Report"])
def test_the_joint_system(text, monkeypatch, name):
    before = Untouched()
    fail(monkeypatch, application, name, RuntimeError, at=2 if name == "measure_loss" else 1)
    with pytest.raises(RuntimeError, match="late"):
        compress_jointly(before.model, CONFIG, text[:4], text[4:6], text[6:8], progress=False)
    before.check()


def test_what_is_compared_shows_a_cut(text):
    before = Untouched()
    compress(before.model, CONFIG, text[:4], progress=False)
    with pytest.raises(AssertionError):
        before.check()

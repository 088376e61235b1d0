import datasets.config
import huggingface_hub.constants
import pytest

import hf_lowrank.inputs.hub
from hf_lowrank.inputs.hub import prefer_offline_if_unreachable


class Session:
    def __init__(self, error=None):
        self.error = error
        self.asked = []

    def head(self, url, timeout):
        self.asked.append((url, timeout))
        if self.error:
            raise self.error


@pytest.fixture
def online(monkeypatch):
    """As if no offline mode were set; whatever is set in the test is undone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def use(monkeypatch, session):
    monkeypatch.setattr(hf_lowrank.inputs.hub, "get_session", lambda: session)
    return session


def test_a_hub_that_does_not_answer_turns_offline_mode_on(monkeypatch, online, capsys):
    session = use(monkeypatch, Session(OSError("no route")))
    assert not prefer_offline_if_unreachable()
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    assert session.asked == [(huggingface_hub.constants.ENDPOINT, 5.0)]
    assert "the Hub does not answer; only what is in the local caches" in capsys.readouterr().err


def test_a_hub_that_answers_leaves_everything_as_it_is(monkeypatch, online):
    use(monkeypatch, Session())
    assert prefer_offline_if_unreachable()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_offline_mode_asks_nothing(monkeypatch, online):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    session = use(monkeypatch, Session())
    assert not prefer_offline_if_unreachable()
    assert session.asked == []

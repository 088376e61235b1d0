"""What is chosen where a config leaves channels and measured prices open."""

from typing import Any

import pytest
import torch

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.compression.options import Texts
from hf_lowrank.compression.recipe import recipe_of, with_recipe
from hf_lowrank.errors import TargetError
from tests.tiny_models import (
    Batch,
    num_lowrank,
    sentence_batches,
    tiny_bert_classifier,
    tiny_llama,
    tiny_mixtral,
    token_batches,
)

pytestmark = pytest.mark.default_recipe
SIZE = LowRankConfig(param_ratio=0.6)


def parts(config: LowRankConfig) -> tuple[bool | None, bool | None]:
    return config.channels, config.measured_prices


def test_a_causal_language_model_gets_channels_and_measured_prices(text: list[Batch]):
    model = tiny_llama()
    report = hf_lowrank.compress(model, SIZE, text[:8], text[8:], progress=False)
    assert report.config.channels is True
    assert report.config.measured_prices is True
    assert report.measured_prices
    explicit = SIZE.replace(channels=True, measured_prices=True)
    again = hf_lowrank.compress(tiny_llama(), explicit, text[:8], text[8:], progress=False)
    assert again.ranks == report.ranks
    assert again.narrowed == report.narrowed
    assert again.evaluation == report.evaluation


def test_a_tolerance_and_a_sweep_follow_the_recipe(text: list[Batch]):
    (report,) = hf_lowrank.sweep(tiny_llama(), SIZE, [0.7], text[:8], progress=False)
    assert (report.config.channels, report.config.measured_prices) == (True, True)
    assert parts(with_recipe(LowRankConfig())) == (True, True)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", ["channels", "measured_prices"])
def test_what_is_given_stays(name: str, on: bool):
    found = with_recipe(SIZE.replace(**{name: on}))
    other = "channels" if name == "measured_prices" else "measured_prices"
    assert getattr(found, name) is on
    assert getattr(found, other) is True


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "plain"},
        {"metric": "whitened"},
        {"rule": "energy"},
        {"param_ratio": None, "rank": 3},
        {"ranks": {"a": 3}},
    ],
)
def test_without_prices_both_are_off(changes: dict[str, Any]):
    assert parts(with_recipe(SIZE.replace(**changes))) == (False, False)


def test_an_encoder_keeps_its_channels():
    model, batches = tiny_bert_classifier(), sentence_batches(4)
    assert parts(recipe_of(model, SIZE, Texts(batches), None)) == (False, False)
    report = hf_lowrank.compress(model, SIZE, batches, progress=False)
    assert not report.narrowed


def test_a_mixture_of_experts_has_channels_to_take(text: list[Batch]):
    model = tiny_mixtral()
    report = hf_lowrank.compress(model, SIZE, text[:8], progress=False)
    assert (report.config.channels, report.config.measured_prices) == (True, True)
    assert any(each.is_cut for each in report.experts.values())


def test_feed_forwards_that_do_not_qualify_have_no_channels_to_take(text: list[Batch]):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *args: None)
    report = hf_lowrank.compress(model, SIZE, text[:8], progress=False)
    assert (report.config.channels, report.config.measured_prices) == (False, True)
    assert num_lowrank(model)
    hf_lowrank.merge(model)
    (swept,) = hf_lowrank.sweep(model, SIZE, [0.6], text[:8], progress=False)
    assert swept.config.channels is False
    with pytest.raises(TargetError, match=r"LlamaForCausalLM has no feed-forward of a known kind"):
        hf_lowrank.compress(model, SIZE.replace(channels=True), text[:8], progress=False)


def test_channels_that_are_asked_for_are_refused_before_the_model_is_measured(text: list[Batch]):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *args: None)
    asked = SIZE.replace(channels=True)
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(TargetError, match=r"LlamaForCausalLM has no feed-forward of a known"):
        hf_lowrank.compress(model, asked, text[:8], text[8:], progress=False)
    assert len(calls) < 8


def test_prices_are_not_measured_without_held_out_text():
    model = tiny_llama()
    one = token_batches(1)
    assert parts(recipe_of(model, SIZE, Texts(one), None)) == (True, False)
    assert parts(recipe_of(model, SIZE, Texts(), None)) == (True, False)
    assert parts(recipe_of(model, SIZE, Texts(one, one), None)) == (True, True)
    assert parts(recipe_of(model, SIZE, Texts(token_batches(2)), None)) == (True, True)


def test_prices_are_not_measured_for_a_loss_of_ones_own():
    def loss(model: torch.nn.Module, batch: Batch) -> Any:
        raise NotImplementedError

    found = recipe_of(tiny_llama(), SIZE, Texts(token_batches(2)), loss)
    assert parts(found) == (True, False)


def test_a_checkpoint_says_what_was_chosen(text: list[Batch]):
    model = tiny_llama()
    hf_lowrank.compress(model, SIZE, text[:8], progress=False)
    saved = model.config.quantization_config
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    assert saved["channels"] is True
    assert "channels" not in SIZE.to_dict()  # left open, not off

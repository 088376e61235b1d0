"""`benchmark.py architectures`: diverse classes come back the same, and what does not is seen."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    T5Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks import architectures, round_trip
from benchmarks.architectures import (
    ArchitecturesArguments,
    all_cases,
    apart,
    sweep_architectures,
)
from benchmarks.round_trip import Case, Trip
from benchmarks.tiny_batches import TASKS
from benchmarks.tiny_configs import tiny_config, tiny_model
from hf_lowrank.errors import ConfigError

DIVERSE = [
    Case("CAUSAL_LM", "gpt2", "GPT2LMHeadModel"),
    Case("CAUSAL_LM", "mixtral", "MixtralForCausalLM"),
    Case("CAUSAL_LM", "falcon_mamba", "FalconMambaForCausalLM"),
    Case("CAUSAL_LM", "jamba", "JambaForCausalLM"),
    Case("SEQUENCE_CLASSIFICATION", "canine", "CanineForSequenceClassification"),
    Case("QUESTION_ANSWERING", "deberta-v2", "DebertaV2ForQuestionAnswering"),
    Case("SEQ_TO_SEQ_CAUSAL_LM", "t5", "T5ForConditionalGeneration"),
    Case("MULTIPLE_CHOICE", "bert", "BertForMultipleChoice"),
]
# Their factors' names, a setting, their feed-forwards or their decoder's length are no others'.
ODD = [
    Case("CAUSAL_LM", "inkling2_text", "Inkling2ForCausalLM"),
    Case("CAUSAL_LM", "xlstm", "xLSTMForCausalLM"),
    Case("CAUSAL_LM", "zamba", "ZambaForCausalLM"),
    Case("SEQUENCE_CLASSIFICATION", "perceiver", "PerceiverForSequenceClassification"),
    Case("TOKEN_CLASSIFICATION", "umt5", "UMT5ForTokenClassification"),
    Case("SEQ_TO_SEQ_CAUSAL_LM", "fsmt", "FSMTForConditionalGeneration"),
]
QUICK = DIVERSE[0]


@pytest.mark.default_recipe
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", round_trip.RECIPES)
@pytest.mark.parametrize("case", DIVERSE, ids=lambda case: case.model_class)
def test_diverse_classes_come_back_bit_for_bit(case: Case, recipe: str):
    trip = round_trip.round_trip(case, recipe)
    assert (trip.outcome, trip.detail) == ("ok", "")
    assert trip.layers
    assert (trip.differences["load"], trip.differences["auto"]) == (0.0, 0.0)
    assert 0 < trip.differences["merge"] < 1e-4


@pytest.mark.default_recipe
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", round_trip.RECIPES)
@pytest.mark.parametrize("case", ODD, ids=lambda case: case.model_class)
def test_odd_classes_come_back_but_for_rounding(case: Case, recipe: str):
    trip = round_trip.round_trip(case, recipe)
    assert (trip.outcome, trip.detail) == ("ok", "")
    assert trip.layers


@pytest.mark.parametrize("kind", [BertConfig, GPT2Config, LlamaConfig, MixtralConfig, T5Config])
def test_a_tiny_config_is_tiny_with_two_layers(kind: Any):
    config = tiny_config(kind)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert config.vocab_size == 99


def test_a_tiny_config_has_a_layer_of_each_kind():
    config = tiny_config(CONFIG_MAPPING["qwen3_next"])
    assert set(config.layer_types) == {"linear_attention", "full_attention"}


def test_a_model_that_stayed_large_is_not_built():
    with pytest.raises(ValueError, match=r"^still has [\d,]+ parameters$"):
        tiny_model(BertForMaskedLM, BertConfig())


def test_a_loaded_model_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch):
    load = round_trip.hf_lowrank.load

    def damaged(folder: Path) -> Any:
        model = load(folder)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.01)
        return model

    monkeypatch.setattr(round_trip.hf_lowrank, "load", damaged)
    trip = round_trip.round_trip(QUICK, "plain")
    assert (trip.outcome, trip.step) == ("differs", "load")
    assert trip.detail.startswith("by ")


def test_what_the_dense_model_loses_too_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    def lose(*args: Any) -> Any:
        raise OSError("planted")

    monkeypatch.setattr(round_trip, "_auto_load", lose)
    trip = round_trip.round_trip(QUICK, "plain")
    assert (trip.outcome, trip.step, trip.detail) == ("transformers", "auto", "OSError: planted")


@pytest.mark.parametrize(("factor", "outcome"), [(1 + 1e-7, "failed"), (1.01, "transformers")])
def test_a_dense_model_comes_back_if_it_differs_by_rounding(
    factor: float, outcome: str, monkeypatch: pytest.MonkeyPatch
):
    load = round_trip._auto_load

    def nearly(*args: Any) -> Any:
        model = load(*args)
        model.lm_head.register_forward_hook(lambda head, inputs, logits: logits * factor)
        return model

    def fail(*args: Any) -> Any:
        raise OSError("planted")

    monkeypatch.setattr(round_trip, "_auto_load", nearly)
    monkeypatch.setattr(round_trip.hf_lowrank, "load", fail)
    assert round_trip.round_trip(QUICK, "plain").outcome == outcome


def test_a_refusal_is_recorded_with_its_sentence(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any) -> None:
        raise ConfigError("a planted\nrefusal")

    monkeypatch.setattr(round_trip, "compress", refuse)
    trip = round_trip.round_trip(QUICK, "plain")
    assert (trip.outcome, trip.detail, trip.step) == ("refused", "a planted refusal", "compress")


@pytest.mark.parametrize(
    ("ending", "word"), [(os.abort, "SIGABRT"), (lambda: os._exit(3), "without a word")]
)
def test_a_crash_ends_its_own_process_alone(
    ending: Any, word: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(architectures, "round_trip", lambda *args: ending())
    trip = apart(QUICK, "plain", 60, 4.0)
    assert (trip.outcome, trip.detail) == ("failed", f"the process ended ({word})")


def test_a_class_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch):
    def spin(*args: Any) -> Any:
        while True:
            time.process_time()

    monkeypatch.setattr(architectures, "round_trip", spin)
    trip = apart(QUICK, "plain", 1, 4.0)
    assert trip.detail in ("the process ended (SIGXCPU)", "the process ended (SIGKILL)")


def test_a_stopped_sweep_goes_on_and_tries_again_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    tried: list[str] = []

    def apart_(case: Case, recipe: str, *limits: Any) -> Trip:
        tried.append(case.model_class)
        outcome = "ok" if case.model_type == "gpt2" else "failed"
        return Trip(outcome, "a_b", "merge", 3, {"load": 0.0, "auto": 0.0, "merge": 1e-7})

    monkeypatch.setattr(architectures, "apart", apart_)
    output, page = tmp_path / "rows.json", tmp_path / "page.md"
    args = ArchitecturesArguments(
        tasks=["CAUSAL_LM"], classes=["gpt2"], output=str(output), page=str(page)
    )
    sweep_architectures(args)
    args.classes = ["gpt2", "llama"]
    sweep_architectures(args)
    assert tried == ["GPT2LMHeadModel"] * 2 + ["LlamaForCausalLM"] * 2
    args.again = ["failed"]
    sweep_architectures(args)
    assert tried[4:] == ["LlamaForCausalLM"] * 2
    found = json.loads(output.read_text("utf-8"))
    assert {"command", "commit", "versions"} <= set(found)
    assert found["counts"] == {"default": {"ok": 1, "failed": 1}, "plain": {"ok": 1, "failed": 1}}
    text = page.read_text("utf-8")
    assert f"2 of {len(all_cases(TASKS))} classes are counted here." in text
    assert "| causal lm | default | 1 | 1 | 0 | 0 | 1 | 0 | 0 |" in text
    assert "- default, merge: a\\_b\n  LlamaForCausalLM" in text
    assert "- causal lm: GPT2LMHeadModel" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0}, r"^seconds must be an integer >= 1, got 0\.$"),
        ({"tasks": ["CHESS"]}, r"^tasks must be one of CAUSAL_LM, .*; got 'CHESS'\.$"),
        ({"classes": ["Nobody"]}, r"^classes: transformers has no 'Nobody' in these mappings\.$"),
    ],
)
def test_settings_that_try_nothing_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        sweep_architectures(ArchitecturesArguments(**changes))

"""Assisted generation: what is counted, that the tokens stay, what is refused, what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.assisted import (
    Assisted,
    AssistedArguments,
    compare_assisted,
    generate,
    measure_assisted,
)
from hf_lowrank import LowRankConfig, get_lowrank_model
from hf_lowrank.errors import ConfigError, DataError
from tests.tiny_models import tiny_llama, token_batches


def compressed(ratio: float = 0.5) -> Any:
    settings = LowRankConfig(param_ratio=ratio, metric="plain")
    return get_lowrank_model(tiny_llama(), settings, progress=False)


def prompts(count: int = 3) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch in token_batches(count, 1, 6)]


def test_a_model_that_assists_itself_has_every_draft_accepted():
    model, twin = tiny_llama(), tiny_llama()
    found = measure_assisted(model, twin, prompts(), 12)
    assert found.same_tokens == 1.0
    assert found.accepted == found.drafted > 0
    assert found.acceptance_rate == 1.0
    assert found.rounds + found.accepted == found.new_tokens == 36


def test_the_compressed_model_assists_its_dense_original():
    model = tiny_llama()
    near, far = (measure_assisted(model, compressed(r), prompts(), 16) for r in (0.95, 0.1))
    for found in (near, far):
        assert found.same_tokens == 1.0
        assert found.rounds + found.accepted == found.new_tokens
        assert 0 <= found.acceptance_rate <= 1
    assert near.acceptance_rate > far.acceptance_rate


def test_generation_leaves_no_hook_and_the_same_greedy_tokens():
    model, draft, (prompt,) = tiny_llama(), compressed(), prompts(1)
    measure_assisted(model, draft, [prompt], 4)
    assert not model._forward_hooks
    assert not draft._forward_hooks
    expected = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(generate(model, prompt, 5), expected)


def test_rates_are_ratios():
    found = Assisted(20, 8, 16, 12, plain_seconds=3.0, assisted_seconds=2.0, same_tokens=1.0)
    assert found.acceptance_rate == 0.75
    assert found.speed_up == 1.5
    assert Assisted(3, 3, 0, 0, 1.0, 1.0, 1.0).acceptance_rate == 0.0
    assert found.to_dict()["acceptance_rate"] == 0.75


def test_assistants_that_do_not_fit_are_refused():
    other = tiny_llama(vocab_size=80)
    with pytest.raises(ConfigError, match="The assistant has 80 tokens, the model 96"):
        measure_assisted(tiny_llama(), other, prompts())
    with pytest.raises(DataError, match="needs a prompt"):
        measure_assisted(tiny_llama(), compressed(), [])


def test_the_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    models = {"dense": tiny_llama(), "small": compressed()}

    def load(source: str, dtype: str) -> tuple[Any, Any]:
        return models[source], None

    monkeypatch.setattr("benchmarks.assisted.load_any_causal_lm", load)
    monkeypatch.setattr("benchmarks.assisted.encode_prompt", lambda tokenizer, text: prompts(1)[0])
    output = tmp_path / "assisted.json"
    compare_assisted(AssistedArguments("small", "dense", new_tokens=4, output=str(output)))
    found = json.loads(output.read_text("utf-8"))
    assert found["assisted"]["new_tokens"] == 2 * 4
    assert found["arguments"]["model"] == "small"
    assert f"{found['assisted']['acceptance_rate']:.1%} of the drafts" in capsys.readouterr().out

"""Speed: what is timed, how often, in which order."""

from typing import Any

import pytest
import torch
from torch import nn

from hf_lowrank import LowRankConfig, get_lowrank_model
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.evaluation import speed
from hf_lowrank.evaluation.speed import (
    SpeedSettings,
    measure_speed,
    speed_before_and_after,
    time_once,
)
from hf_lowrank.modeling.surgery import factorize_, restore_
from tests.compression.analyzed import analyzed
from tests.tiny_models import (
    MAX_LENGTH,
    num_lowrank,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    token_batches,
)

SHORT = SpeedSettings(batch_size=2, prompt_tokens=8, new_tokens=3, repeats=3)


def compressed(ratio: float = 0.5) -> Any:
    settings = LowRankConfig(param_ratio=ratio, metric="plain")
    return get_lowrank_model(tiny_llama(), settings, progress=False)


def test_models_are_timed_in_turn_and_the_first_round_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
):
    models = {"a": tiny_llama(), "b": compressed()}
    order: list[str] = []

    def timed(model: Any, tokens: torch.Tensor, prompt_tokens: int) -> tuple[float, float]:
        assert tokens.shape == (2, 11)
        order.append(next(name for name, each in models.items() if each is model))
        return float(len(order)), 0.5

    monkeypatch.setattr(speed, "time_once", timed)
    found = measure_speed(models, SHORT)
    assert "".join(order) == "abbaabba"
    assert found["a"].prefill == (4.0, 5.0, 8.0)
    assert found["b"].prefill == (3.0, 6.0, 7.0)


def test_the_summary_is_made_of_medians():
    found = speed._timing(SHORT, [(4.0, 2.0), (1.0, 3.0), (100.0, 0.1)])
    assert (found.prefill, found.decode) == ((4.0, 1.0, 100.0), (2.0, 3.0, 0.1))
    assert found.prefill_seconds == 4.0
    assert found.decode_seconds == 2.0
    assert found.prefill_tokens_per_second == 2 * 8 / 4.0
    assert found.decode_tokens_per_second == 2 * 3 / 2.0


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_opt, compressed])
def test_one_pass_reads_the_prompt_and_then_token_by_token_from_the_cache(build: Any):
    model = build()
    lengths, outputs = [], []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        lengths.append(kwargs["input_ids"].shape[1])
        outputs.append(output.logits[:, -1])

    handle = model.register_forward_hook(note, with_kwargs=True)
    tokens = token_batches(1, length=11)[0]["input_ids"]
    prefill, decode = time_once(model.train(), tokens, 8)
    handle.remove()
    assert lengths == [8, 1, 1, 1]
    assert prefill > 0
    assert decode > 0
    assert model.training
    whole = model.eval()(tokens).logits
    for step, found in enumerate(outputs):
        torch.testing.assert_close(found, whole[:, 7 + step], atol=1e-4, rtol=1e-4)


def test_real_seconds_come_out_for_both_models():
    found = measure_speed({"model": compressed(), "baseline": tiny_llama()}, SHORT)
    for each in found.values():
        assert len(each.prefill) == len(each.decode) == 3
        assert min(each.prefill + each.decode) > 0


# Before and after, in one model


def cut_model() -> tuple[Any, dict[str, nn.Module]]:
    """A compressed model and the dense layers that it had."""
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.5, metric="plain")
    found = analyzed(model, config)
    return model, factorize_(model, found.factors, found.plan_for_ratio(0.5))


def watch(
    monkeypatch: pytest.MonkeyPatch, fail_at: int = 0, error: type[BaseException] = RuntimeError
) -> list[str]:
    """Lets each round note what it is given: d for dense layers, c for low-rank ones."""
    rounds: list[str] = []

    def timed(model: Any, tokens: torch.Tensor, prompt_tokens: int) -> tuple[float, float]:
        rounds.append("c" if num_lowrank(model) else "d")
        if len(rounds) == fail_at:
            raise error("broken on purpose")
        return (2.0, 8.0) if rounds[-1] == "d" else (1.0, 16.0)

    monkeypatch.setattr(speed, "time_once", timed)
    return rounds


def test_dense_and_compressed_rounds_alternate_in_one_model(monkeypatch: pytest.MonkeyPatch):
    model, originals = cut_model()
    modules, rounds = dict(model.named_modules()), watch(monkeypatch)
    found = speed_before_and_after(model, originals, SHORT)
    assert "".join(rounds) == "dccddccd"
    assert dict(model.named_modules()) == modules
    assert found is not None
    assert found.dense.prefill == (2.0, 2.0, 2.0)
    assert found.dense.prefill_tokens_per_second == 2 * 8 / 2.0
    assert found.compressed.decode == (16.0, 16.0, 16.0)
    assert found.compressed.decode_tokens_per_second == 2 * 3 / 16.0


@pytest.mark.parametrize("fail_at", [1, 2, 4, 5])
def test_the_compressed_layers_are_back_after_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, fail_at: int
):
    model, originals = cut_model()
    modules, rounds = dict(model.named_modules()), watch(monkeypatch, fail_at, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        speed_before_and_after(model, originals, SHORT)
    assert len(rounds) == fail_at
    assert dict(model.named_modules()) == modules
    restore_(model, originals)
    assert num_lowrank(model) == 0


def test_a_failed_measurement_is_a_warning_and_no_lost_run(monkeypatch: pytest.MonkeyPatch):
    model, originals = cut_model()
    modules = dict(model.named_modules())
    watch(monkeypatch, fail_at=1)
    with pytest.warns(UserWarning, match="The speed was not measured: broken on purpose"):
        assert speed_before_and_after(model, originals) is None
    assert dict(model.named_modules()) == modules


def test_a_model_without_a_cache_is_not_timed():
    model, originals = cut_model()

    def forget(module: Any, args: Any, output: Any) -> Any:
        output.past_key_values = None
        return output

    model.register_forward_hook(forget)
    with pytest.warns(UserWarning, match="LlamaForCausalLM hands back no past_key_values"):
        assert speed_before_and_after(model, originals, SHORT) is None


def test_the_default_settings_fit_the_model_and_say_where_it_ran():
    model, originals = cut_model()
    found = speed_before_and_after(model, originals)
    assert found is not None
    settings = found.settings
    assert settings.prompt_tokens + settings.new_tokens == MAX_LENGTH
    assert settings.rounds == len(found.dense.prefill) == settings.repeats == 5
    assert settings.threads == torch.get_num_threads()
    assert (settings.device, settings.dtype) == ("cpu", "float32")
    assert settings.hardware
    large = speed._settings_for(tiny_llama(max_position_embeddings=4096))
    assert (large.prompt_tokens, large.new_tokens) == (128, 32)


def test_no_round_begins_after_the_time_is_up(monkeypatch: pytest.MonkeyPatch):
    model, originals = cut_model()
    rounds = watch(monkeypatch)
    short = SpeedSettings(2, 8, 3, repeats=9, max_seconds=0.0)
    found = speed_before_and_after(model, originals, short)
    assert "".join(rounds) == "dccd"
    assert found is not None
    assert found.settings.rounds == 1


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ConfigError, match="BertForSequenceClassification is no causal language"):
        measure_speed({"model": tiny_bert_classifier()}, SHORT)
    with pytest.raises(DataError, match=r"60 prompt and 5 new tokens are more than .* \(64\)"):
        measure_speed({"model": tiny_llama()}, SpeedSettings(1, 60, 5))
    with pytest.raises(ConfigError, match="repeats must be an integer >= 1, got 0"):
        SpeedSettings(repeats=0)

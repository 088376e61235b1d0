"""Recovery: what it trains, what it keeps, and what it gives back."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_lowrank
from hf_lowrank.compression import recovery
from hf_lowrank.compression.recovery import RecoverySettings, recover_
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError, DataError, NumericalError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.measuring.causal import distillation_losses, hidden_states
from hf_lowrank.modeling.surgery import factorize_
from hf_lowrank.report.sections import Recovery
from tests.compression.analyzed import analyzed
from tests.measuring.losses import tiny_bert_decoder
from tests.tiny_models import (
    Batch,
    batches_for,
    logits,
    snapshot,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    token_batches,
    written_batches,
)

GENTLE = RecoverySettings(steps=20, learning_rate=3e-3)
HARMFUL = RecoverySettings(steps=5, learning_rate=3.0)


def compressed(
    build: Callable[[], Any] = tiny_llama,
) -> tuple[Any, dict[str, nn.Module], list[Batch], list[Batch]]:
    """A cut model, its dense layers, text that the dense model wrote, and held-out text."""
    model = build()
    batches, held_out = written_batches(model, 8), written_batches(model, 4, seed=1)
    analysis = analyzed(model, LowRankConfig(param_ratio=0.4, metric="plain"))
    originals = factorize_(model, analysis.factors, analysis.plan_for_ratio(0.4))
    return model, originals, batches, held_out


def factor_names(model: nn.Module) -> set[str]:
    return {
        f"{name}.{part}"
        for name in factorized_layers(model)
        for part in ("lowrank_A.weight", "lowrank_B.weight")
    }


def recover(model: nn.Module, *rest: Any) -> Recovery:
    return recover_(model, *rest, progress=False)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_held_out_loss_falls_and_only_the_factors_change(build: Callable[[], Any]):
    model, originals, batches, held_out = compressed(build)
    before, loss = snapshot(model), measure_loss(model, held_out).mean
    dense = {name: snapshot(layer) for name, layer in originals.items()}
    found = recover(model, originals, batches, held_out, GENTLE)
    assert found.accepted
    assert found.steps == 20
    assert found.loss_before == loss
    assert found.loss_after < loss - 0.05
    assert measure_loss(model, held_out).mean == found.loss_after
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == factor_names(model)
    for name, layer in originals.items():
        assert all(torch.equal(t, dense[name][k]) for k, t in layer.state_dict().items())


def test_a_harmful_run_is_rejected_and_every_bit_restored():
    model, originals, batches, held_out = compressed()
    before = snapshot(model)
    found = recover(model, originals, batches, held_out, HARMFUL)
    assert not found.accepted
    assert found.loss_after >= found.loss_before
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_steps_change_nothing():
    model, originals, batches, held_out = compressed()
    before = snapshot(model)
    found = recover(model, originals, batches, held_out, RecoverySettings(steps=0))
    assert not found.accepted
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_log_file_hears_of_the_steps(capsys: pytest.CaptureFixture[str]):
    cut, settings = compressed(), RecoverySettings(steps=2)
    recover_(*cut, settings, progress=False)
    assert capsys.readouterr().err == ""
    recover_(*cut, settings)
    assert capsys.readouterr().err == "... recover: 0 of 2 steps, 0%\n"


@pytest.mark.parametrize("kind", ["factors", "lora"])
def test_a_model_that_stayed_dense_has_nothing_to_train(kind: str):
    model = tiny_llama()
    before, batches = snapshot(model), written_batches(model, 4)
    found = recover(model, {}, batches, batches[:1], RecoverySettings(5, kind=kind))
    assert (found.steps, found.accepted) == (0, False)
    assert found.loss_after == found.loss_before == measure_loss(model, batches[:1]).mean
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_an_encoder_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch):
    model = tiny_bert_classifier()
    batches = batches_for(model, 4)
    monkeypatch.setattr(
        "hf_lowrank.compression.application.analyze", lambda *a, **k: pytest.fail("worked")
    )
    config = LowRankConfig(param_ratio=0.5)
    with pytest.raises(ConfigError, match="BertForSequenceClassification is no causal language"):
        hf_lowrank.compress(model, config, batches, recover_steps=5, progress=False)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_model_with_more_than_a_head_is_refused_before_any_work(
    stages: int, monkeypatch: pytest.MonkeyPatch
):
    model, text = tiny_bert_decoder(), token_batches(6)
    layers = dict(model.named_modules())
    monkeypatch.setattr(
        "hf_lowrank.compression.application.analyze", lambda *a, **k: pytest.fail("worked")
    )
    config, options = LowRankConfig(param_ratio=0.5), {"recover_steps": 6, "stages": stages}
    with pytest.raises(ConfigError, match=r"^BertLMHeadModel: .*; leave out recover_steps"):
        hf_lowrank.compress(model, config, text, progress=False, **options)
    assert dict(model.named_modules()) == layers
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("calibration", "held_out"), [(None, 2), ([], 2), (2, [])])
def test_a_recovery_without_text_is_refused_before_any_work(
    calibration: Any, held_out: Any, stages: int, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_llama()
    text = [token_batches(n) if isinstance(n, int) else n for n in (calibration, held_out)]
    monkeypatch.setattr(
        "hf_lowrank.compression.application.analyze", lambda *a, **k: pytest.fail("worked")
    )
    options = {"held_out": text[1], "recover_steps": 6, "stages": stages, "progress": False}
    config = LowRankConfig(param_ratio=0.5, metric="plain")
    with pytest.raises(DataError, match="needs calibration text to train on and held-out text"):
        hf_lowrank.compress(model, config, text[0], **options)
    assert not factorized_layers(model)


def test_a_model_in_training_mode_is_judged_without_its_dropout():
    model = tiny_llama(attention_dropout=0.5).train()
    text = token_batches(4)
    config = LowRankConfig(param_ratio=0.5, metric="plain")
    report = hf_lowrank.compress(model, config, text, recover_steps=1, progress=False)
    assert report.recovery is not None
    assert model.training


def test_flags_gradients_and_modes_are_as_before():
    model, originals, batches, held_out = compressed()
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = next(iter(factorized_layers(model).values()))
    frozen.lowrank_A.weight.requires_grad_(False)
    model.train()
    model.model.layers[0].eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    recover(model, originals, batches, held_out, GENTLE)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_all_logits_at_once(kl_weight: float):
    """Every batch's first loss, its value and its gradients, with the rate at 0."""
    model, _, batches, _ = compressed()
    batch = {name: tensor.clone() for name, tensor in batches[0].items()}
    batch["input_ids"][-1, -5:], batch["attention_mask"][-1, -5:] = 0, 0
    dense = tiny_llama()
    with torch.no_grad():
        teacher = hidden_states(dense, batch)
    model.requires_grad_(False)
    factors = [p for n, p in model.named_parameters() if n in factor_names(model)]
    for factor in factors:
        factor.requires_grad_(True)
    found = distillation_losses(model, batch, teacher, kl_weight)
    loss = found.sums.sum() / found.counts.sum()
    gradients = torch.autograd.grad(loss, factors)
    student = model(**batch).logits[:, :-1].log_softmax(-1)
    target = logits(dense, batch)[:, :-1].log_softmax(-1)
    labels = batch["input_ids"][:, 1:]
    scored = batch["attention_mask"][:, 1:].bool()
    likelihood = F.nll_loss(student[scored], labels[scored])
    divergence = F.kl_div(student[scored], target[scored], log_target=True, reduction="batchmean")
    expected = (1 - kl_weight) * likelihood + kl_weight * divergence
    assert float(divergence.detach()) > 0.1
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(expected, factors), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_the_first_step_is_adamw_on_that_loss(monkeypatch: pytest.MonkeyPatch):
    model, originals, batches, held_out = compressed()
    seen: list[float] = []
    compute = recovery.distillation_losses

    def note(model: Any, batch: Any, teacher: torch.Tensor, weight: float) -> Any:
        torch.testing.assert_close(
            teacher, hidden_states(tiny_llama(), batch), atol=1e-5, rtol=1e-4
        )
        found = compute(model, batch, teacher, weight)
        seen.append(float(found.sums.detach().sum() / found.counts.sum()))
        return found

    monkeypatch.setattr(recovery, "distillation_losses", note)
    recover(model, originals, batches, held_out, RecoverySettings(steps=16, learning_rate=3e-3))
    assert len(seen) == 16
    assert sum(seen[8:]) < sum(seen[:8])  # two passes over the same eight batches


def test_the_teacher_reads_each_batch_once(monkeypatch: pytest.MonkeyPatch):
    model, originals, batches, held_out = compressed()
    lengths: list[int] = []

    def note(model: Any, batch: Batch) -> torch.Tensor:
        lengths.append(len(batch["input_ids"]))
        return hidden_states(model, batch)

    monkeypatch.setattr(recovery, "hidden_states", note)
    recover(model, originals, batches, held_out, RecoverySettings(steps=20))
    assert len(batches) == len(lengths) == 8


def test_the_seed_decides_the_order_and_the_result():
    def trained(seed: int) -> dict[str, torch.Tensor]:
        model, originals, batches, held_out = compressed()
        recover(model, originals, batches, held_out, RecoverySettings(6, 1e-3, seed=seed))
        return snapshot(model)

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_batch_is_seen_once_in_each_pass():
    order = recovery._order(5, RecoverySettings(steps=12))
    assert len(order) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:10]


def test_the_rate_warms_up_over_a_tenth_and_falls_as_a_cosine():
    rates = [recovery._rate(step, 10, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_small_steps_are_not_lost_in_bf16():
    """Each step is under half a unit in bf16's last place; their sum is not."""
    model, originals, batches, held_out = compressed()
    model.bfloat16()
    for layer in originals.values():
        layer.bfloat16()
    before = snapshot(model)
    settings = RecoverySettings(steps=40, learning_rate=2e-4, max_grad_norm=1e6)
    found = recover(model, originals, batches, held_out, settings)
    name = sorted(factor_names(model))[0]
    after = model.state_dict()[name]
    assert after.dtype == torch.bfloat16
    assert found.accepted
    moved = (after.float() - before[name].float()).abs()
    assert float((moved > 0).float().mean()) > 0.5


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_loss_that_is_no_number_raises_and_restores(
    weight: float, monkeypatch: pytest.MonkeyPatch
):
    model, originals, batches, held_out = compressed()
    before = snapshot(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    calls: list[int] = []
    compute = recovery.distillation_losses

    def poisoned(*args: Any) -> Any:
        found = compute(*args)
        calls.append(1)
        sums = found.sums * weight if len(calls) == 3 else found.sums
        return type(found)(sums, found.counts)

    monkeypatch.setattr(recovery, "distillation_losses", poisoned)
    message = rf"The recovery loss is {weight}; load the model in float32"
    with pytest.raises(NumericalError, match=message):
        recover(model, originals, batches, held_out, GENTLE)
    assert len(calls) == 3
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert set(factorized_layers(model)) == set(originals)


def test_an_interrupt_leaves_the_factors_as_they_were(monkeypatch: pytest.MonkeyPatch):
    model, originals, batches, held_out = compressed()
    before = snapshot(model)
    calls: list[int] = []
    compute = recovery.distillation_losses

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(recovery, "distillation_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(model, originals, batches, held_out, GENTLE)
    assert set(factorized_layers(model)) == set(originals)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_recovered_model_saves_and_loads(tmp_path: Any):
    model = tiny_llama()
    batches, held_out = written_batches(model, 8), written_batches(model, 4, seed=1)
    dense = copy.deepcopy(model)
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.4, metric="plain"), progress=False)
    originals = {name: dense.get_submodule(name) for name in factorized_layers(model)}
    assert recover(model, originals, batches, held_out, GENTLE).accepted
    model.save_pretrained(tmp_path / "model")
    loaded = hf_lowrank.load(tmp_path / "model")
    assert torch.equal(logits(loaded, held_out[0]), logits(model, held_out[0]))

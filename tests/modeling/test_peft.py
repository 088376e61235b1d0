"""PEFT on a compressed model: LoRA on the factors, as a user's own training and as a recovery."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankLinear, get_lowrank_model, print_trainable_parameters
from hf_lowrank.compression import recovery
from hf_lowrank.compression.recovery import RecoverySettings, recover_
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.rebuild import factorized_layers, narrowed_layers
from hf_lowrank.modeling import lora
from tests.compression.test_recovery import compressed, factor_names
from tests.scripts import word_tokenizer, written_text
from tests.tiny_models import (
    logits,
    snapshot,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    written_batches,
)

pytestmark = pytest.mark.oldest

LORA = RecoverySettings(steps=20, learning_rate=1e-2, kind="lora", lora_rank=4)
PLAIN = LowRankConfig(param_ratio=0.5, metric="plain")


def small_model(build: Any = tiny_llama) -> Any:
    return get_lowrank_model(build(), PLAIN, progress=False)


def adapted_layers(model: nn.Module) -> set[str]:
    """Layers that have an adapter, without the wrapper's prefix."""
    names = (n for n, m in model.named_modules() if hasattr(m, "lora_A"))
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert_classifier])
def test_the_names_of_the_factors_are_lora_targets(build: Any):
    model = small_model(build)
    factors = {name.removesuffix(".weight") for name in factor_names(model)}
    adapted = get_peft_model(model, LoraConfig(target_modules=["lowrank_A", "lowrank_B"]))
    assert adapted_layers(adapted) == factors


def test_all_linear_finds_every_factor():
    model = small_model()
    factors = {name.removesuffix(".weight") for name in factor_names(model)}
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert factors <= adapted_layers(adapted)
    assert "lm_head" not in adapted_layers(adapted)


def test_an_adapter_is_trained_saved_loaded_and_merged(tmp_path: Path):
    model, (batch,) = small_model(), written_batches(tiny_llama(), 1)
    model.save_pretrained(tmp_path / "model")
    before = logits(model, batch)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lowrank_A", "lowrank_B"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    trained = logits(adapted.eval(), batch)
    assert float((trained - before).abs().max()) > 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(hf_lowrank.load(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), batch), trained)
    merged = again.merge_and_unload()
    assert not adapted_layers(merged)
    torch.testing.assert_close(logits(merged, batch), trained, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded: Any = hf_lowrank.load(tmp_path / "merged")
    assert len(factorized_layers(loaded)) == len(factorized_layers(merged)) > 0
    assert torch.equal(logits(loaded, batch), logits(merged, batch))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_lora_recovery_lowers_the_loss_and_ends_with_plain_factors(build: Any):
    model, originals, batches, held_out = compressed(build)
    before, loss = snapshot(model), measure_loss(model, held_out).mean
    kinds = {name: type(module) for name, module in model.named_modules()}
    found = recover_(model, originals, batches, held_out, LORA, progress=False)
    assert found.accepted
    assert found.kind == "lora"
    assert found.loss_before == loss
    assert found.loss_after < loss - 0.05
    assert measure_loss(model, held_out).mean == found.loss_after
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == factor_names(model)
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4) <= 4
    assert not hasattr(model, "peft_config")


def test_harmful_lora_is_rejected_and_every_bit_restored():
    model, originals, batches, held_out = compressed()
    before = snapshot(model)
    harmful = RecoverySettings(steps=4, learning_rate=0.3, kind="lora")
    assert not recover_(model, originals, batches, held_out, harmful, progress=False).accepted
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_interrupted_lora_recovery_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    model, originals, batches, held_out = compressed()
    model.model.embed_tokens.weight.requires_grad_(False)
    before, calls = snapshot(model), []
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    compute = recovery.distillation_losses

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(recovery, "distillation_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover_(model, originals, batches, held_out, LORA, progress=False)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not hasattr(model, "peft_config")


def test_lora_recovery_depends_on_its_seed_alone():
    def trained(seed: int) -> dict[str, torch.Tensor]:
        model, originals, batches, held_out = compressed()
        torch.manual_seed(99)
        state = torch.random.get_rng_state()
        settings = RecoverySettings(3, 1e-2, seed=seed, kind="lora")
        recover_(model, originals, batches, held_out, settings, progress=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        return snapshot(model)

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_compress_recovers_with_lora_and_saves(tmp_path: Path):
    model = tiny_llama()
    text, evaluation = written_batches(model, 8), written_batches(model, 4, seed=1)
    options = {"recover": "lora", "recover_steps": 20, "progress": False}
    report = hf_lowrank.compress(model, PLAIN, text, evaluation, **options)
    assert report.recovery is not None
    assert report.recovery.kind == "lora"
    assert report.recovery.accepted
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf_lowrank.load(tmp_path), text[0]), logits(model, text[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recover": "lora"}, "recover='lora' does nothing without steps; give recover_steps > 0"),
        ({"recover": "qlora", "recover_steps": 5}, "must be one of factors, lora; got 'qlora'"),
    ],
)
def test_settings_of_a_recovery_are_checked_before_any_change(options: Any, message: str):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=re.escape(message)):
        hf_lowrank.compress(model, PLAIN, written_batches(model), progress=False, **options)
    assert not factorized_layers(model)


def test_without_peft_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package peft: pip install 'hf-lowrank\[peft"):
        RecoverySettings(5, kind="lora")


def test_default_rates_differ_by_kind():
    assert RecoverySettings(5).peak_rate == 1e-4
    assert RecoverySettings(5, kind="lora").peak_rate == 1e-3
    assert RecoverySettings(5, 0.5, kind="lora").peak_rate == 0.5


def test_trainable_parameters_are_printed_as_peft_does(capsys: pytest.CaptureFixture[str]):
    model = small_model()
    model.print_trainable_parameters()
    everything = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (
        f"trainable params: {everything:,} || all params: {everything:,} || trainable%: 100.0000\n"
    )
    model.model.embed_tokens.weight.requires_grad_(False)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
    adapted.print_trainable_parameters()
    print_trainable_parameters(adapted)
    one, other = capsys.readouterr().out.splitlines()
    assert one == other


def test_the_added_method_survives_copies_and_pickle(capsys: pytest.CaptureFixture[str]):
    model = small_model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.requires_grad_(False)
        twin.print_trainable_parameters()
        assert capsys.readouterr().out.startswith("trainable params: 0 ||")
    model.print_trainable_parameters()
    assert capsys.readouterr().out.endswith("trainable%: 100.0000\n")


@pytest.mark.filterwarnings("ignore")
def test_trl_fine_tunes_a_compressed_model(tmp_path: Path):
    trl = pytest.importorskip("trl")
    model = small_model()
    before = snapshot(model)
    settings = trl.SFTConfig(
        tmp_path,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        max_length=16,
        learning_rate=1e-2,
        save_strategy="no",
        bf16=False,
    )
    texts = Dataset.from_dict({"text": [written_text(32)] * 16})
    trainer = trl.SFTTrainer(
        model, args=settings, train_dataset=texts, processing_class=word_tokenizer()
    )
    trainer.train()
    assert isinstance(model.model.layers[0].mlp.up_proj, LowRankLinear)
    assert any(not torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("factors", ["lowrank_A lowrank_B", "lowrank_A", "lowrank_B", ""])
def test_merging_under_an_adapter_is_refused_before_any_change(factors: str):
    model = tiny_llama()
    (batch,) = written_batches(model, 1)
    config = PLAIN if factors else LowRankConfig(param_ratio=0.5, channels=True)
    hf_lowrank.compress(model, config, [batch], progress=False)
    names = factors.split() or list(narrowed_layers(model))
    adapted = get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False))
    kinds = [(name, type(module)) for name, module in adapted.named_modules()]
    trained = logits(adapted.eval(), batch)
    with pytest.raises(TargetError, match=r"_proj: .* merge_and_unload the adapter first\.$"):
        hf_lowrank.merge(adapted)
    assert [(name, type(module)) for name, module in adapted.named_modules()] == kinds
    assert torch.equal(logits(adapted, batch), trained)
    merged = hf_lowrank.merge(adapted.merge_and_unload())
    torch.testing.assert_close(logits(merged, batch), trained, atol=1e-3, rtol=1e-3)
    assert {type(m) for n, m in merged.named_modules() if n.endswith("_proj")} == {nn.Linear}

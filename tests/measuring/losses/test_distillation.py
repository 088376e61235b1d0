"""Losses that mix labels and a teacher's predictions."""

import pytest
import torch
import torch.nn.functional as F

from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring import causal
from hf_lowrank.measuring.causal import distillation_losses, hidden_states
from tests.measuring.losses import (
    CHANGED_LOGITS,
    assert_same_loss_and_gradient,
    causal_batch,
    generator,
    tiny_bert_decoder,
)
from tests.tiny_models import HIDDEN, tiny_bert_classifier, tiny_llama


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("slice_tokens", [5, 512])
def test_distillation_mixes_labels_and_teacher(monkeypatch, kl_weight, slice_tokens):
    monkeypatch.setattr(causal, "SLICE_TOKENS", slice_tokens)
    model, batch = tiny_llama(), causal_batch("right padding")
    teacher = torch.randn(3, 16, HIDDEN, generator=generator())
    student_logs = model(**batch).logits[:, :-1].log_softmax(dim=-1)
    teacher_logs = model.lm_head(teacher)[:, :-1].detach().log_softmax(dim=-1)
    kept = batch["attention_mask"][:, 1:].bool()
    likelihood = -student_logs.gather(2, batch["input_ids"][:, 1:, None])[..., 0][kept].sum()
    divergence = (teacher_logs.exp() * (teacher_logs - student_logs)).sum(dim=-1)[kept].sum()
    assert abs((likelihood - divergence).item()) > 1
    wanted = (1 - kl_weight) * likelihood + kl_weight * divergence
    result = distillation_losses(model, batch, teacher, kl_weight)
    assert result.counts.tolist() == [15, 10, 15]
    assert_same_loss_and_gradient(model, result.sums.sum(), wanted)


def test_the_teacher_that_is_the_student_teaches_nothing():
    model, batch = tiny_llama(), causal_batch("labels")
    teacher = hidden_states(model, batch).detach()
    assert teacher.shape == (3, 16, HIDDEN)
    result = distillation_losses(model, batch, teacher, 1.0)
    assert result.sums.abs().max() < 1e-4
    assert distillation_losses(model, batch, teacher.flip(0), 1.0).sums.max() > 1


@pytest.mark.parametrize("make", [tiny_bert_decoder, tiny_bert_classifier])
def test_distillation_needs_a_head_that_is_last(make):
    model = make()
    message = f"^{type(model).__name__}: distillation needs a causal language model whose logits"
    with pytest.raises(ConfigError, match=message):
        hidden_states(model, causal_batch("tokens"))


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
@pytest.mark.parametrize("slice_tokens", [5, 512])
def test_changed_logits_are_distilled_slice_by_slice(monkeypatch, name, slice_tokens):
    monkeypatch.setattr(causal, "SLICE_TOKENS", slice_tokens)
    model, other = CHANGED_LOGITS[name](), CHANGED_LOGITS[name]()
    batch = causal_batch("right padding")
    with torch.no_grad():
        for layer in other.base_model.layers:
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight.roll(1, dims=0))
        teacher_logs = other(**batch).logits[:, :-1].double().log_softmax(dim=-1)
        teacher = hidden_states(other, batch)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda *call: sizes.append(call[-1].shape[-2]))
    found = distillation_losses(model, batch, teacher, 0.4)
    handle.remove()
    assert max(sizes) <= slice_tokens
    student_logs = model(**batch).logits[:, :-1].double().log_softmax(dim=-1)
    kept = batch["attention_mask"][:, 1:].bool()
    likelihood = -student_logs.gather(2, batch["input_ids"][:, 1:, None])[..., 0][kept].sum()
    divergence = (teacher_logs.exp() * (teacher_logs - student_logs)).sum(dim=-1)[kept].sum()
    assert divergence > 0.01
    assert_same_loss_and_gradient(model, found.sums.sum(), 0.6 * likelihood + 0.4 * divergence)


def test_distillation_of_a_bfloat16_model_is_computed_in_fp32():
    model, batch = tiny_llama().bfloat16(), causal_batch("no padding")
    teacher = hidden_states(model, batch).detach().roll(1, dims=0)
    student_logs = model(**batch).logits.float()[:, :-1].log_softmax(dim=-1)
    teacher_logs = model.lm_head(teacher).float()[:, :-1].log_softmax(dim=-1)
    wanted = F.kl_div(student_logs, teacher_logs, reduction="none", log_target=True).sum((1, 2))
    found = distillation_losses(model, batch, teacher, 1.0).sums
    assert torch.allclose(found, wanted, rtol=1e-4)

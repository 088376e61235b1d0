"""Mixed ranks: the layer, the loss of two passes, and a run that ends purely low-rank."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification

import hf_lowrank
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.pruning.mixed_rank import draw_gates_, mix_, mixed_layers, unmix_
from hf_lowrank.pruning.mixed_trainer import MixedRankTrainer
from hf_lowrank.pruning.pruning_arguments import MixedRankArguments
from hf_lowrank.training.divergence import divergence
from tests.pruning import factorized, mixed_trainer
from tests.tiny_models import (
    build,
    logits,
    sentence_batches,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
)
from tests.training import CHECKPOINTING, StopAt, arguments, sentence_rows, settings


def cut_bert() -> tuple[Any, dict[str, nn.Module]]:
    model = tiny_bert_classifier()
    return model, factorized(model)


def batch() -> dict[str, torch.Tensor]:
    return dict(sentence_batches(1)[0])


# The layer


@pytest.mark.parametrize("make", [tiny_bert_classifier, tiny_gpt2])
def test_with_all_sparse_matrices_the_model_is_the_one_before_the_cut(make: Any):
    inputs = {n: t for n, t in batch().items() if n != "labels"}
    model = make()
    before = logits(model, inputs)
    sparse = factorized(model)
    cut = logits(model, inputs)
    assert (cut - before).abs().max() > 0.01
    layers = mix_(model, sparse)
    draw_gates_(layers, 1.0)
    torch.testing.assert_close(logits(model, inputs), cut, atol=0, rtol=0)  # eval mode
    model.train()
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-5, rtol=1e-4)


def test_gates_are_drawn_for_each_layer_with_the_given_chance():
    model, sparse = cut_bert()
    layers = mix_(model, sparse)
    torch.manual_seed(0)
    draws = []
    for _ in range(200):
        draw_gates_(layers, 0.3)
        draws.append([layer.uses_sparse for layer in layers.values()])
    share = torch.tensor(draws).float().mean(dim=0)
    assert (share - 0.3).abs().max() < 0.12
    assert len({tuple(draw) for draw in draws}) > 100


def test_the_state_dict_is_that_of_the_plain_model_and_parameters_are_shared():
    model, sparse = cut_bert()
    state, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    mix_(model, sparse)
    assert list(model.state_dict()) == state
    assert {id(p) for p in model.parameters()} == parameters
    unmix_(model)
    assert list(model.state_dict()) == state
    assert {id(p) for p in model.parameters()} == parameters
    assert {type(layer) for layer in factorized_layers(model).values()} == {LowRankLinear}


def test_layers_that_do_not_fit_are_refused_before_any_edit():
    model, sparse = cut_bert()
    names = list(sparse)
    with pytest.raises(TargetError, match="classifier: is no low-rank layer"):
        mix_(model, {names[0]: sparse[names[0]], "classifier": model.classifier})
    wide = next(name for name in names if "intermediate" in name)
    with pytest.raises(TargetError, match=r"has shape \(64, 32\), the factors are for \(32, 32\)"):
        mix_(model, {names[0]: sparse[wide]})
    assert not mixed_layers(model)


# The trainer


def test_the_loss_is_the_mean_of_both_passes_and_their_divergence(tmp_path: Path, monkeypatch: Any):
    model, sparse = cut_bert()
    trainer = mixed_trainer(model, sparse, sentence_rows(), tmp_path, consistency_weight=0.7)
    trainer.state.max_steps = 10
    gates = iter([[True] * 12, [False] * 12])

    def fixed(layers: Any, probability: float) -> None:
        assert probability == 0.5
        for layer, gate in zip(layers.values(), next(gates), strict=True):
            layer.uses_sparse = gate

    monkeypatch.setattr("hf_lowrank.pruning.mixed_trainer.draw_gates_", fixed)
    inputs = batch()
    loss = trainer.compute_loss(model.train(), inputs)
    one = tiny_bert_classifier()(**inputs)
    two = model.eval()(**inputs)
    apart = divergence(model, inputs, one, two, symmetric=True)
    assert float(apart.detach()) > 1e-3
    torch.testing.assert_close(loss, (one.loss + two.loss) / 2 + 0.7 * apart, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(layer.lowrank_A.weight.grad is not None for layer in mixed_layers(model).values())


def test_the_teacher_is_met_by_both_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, sparse = cut_bert()
    teacher = tiny_bert_classifier(seed=1)
    trainer = mixed_trainer(
        model, sparse, sentence_rows(), tmp_path, teacher=teacher, distillation_weight=0.25,
        consistency_weight=0.0,
    )  # fmt: skip
    trainer.state.max_steps = 10
    calls, forward = [], teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda **x: calls.append(x) or forward(**x))
    inputs = batch()
    torch.manual_seed(0)
    loss = trainer.compute_loss(model.train(), inputs)
    assert len(calls) == 1
    torch.manual_seed(0)
    losses = []
    for _ in range(2):
        draw_gates_(mixed_layers(model), 0.5)
        student = model(**inputs)
        apart = divergence(model, inputs, forward(**inputs), student, temperature=2.0)
        losses.append(0.75 * student.loss + 0.25 * apart)
    assert losses[0] != losses[1]
    torch.testing.assert_close(loss, sum(losses) / 2)


def test_a_run_ends_low_rank_with_the_sparse_matrices_freed(tmp_path: Path):
    model, sparse = cut_bert()
    references = [weakref.ref(layer.weight) for layer in sparse.values()]
    num_bytes = sum(4 * linear_weight(layer).numel() for layer in sparse.values())
    held = []

    class Watch(StopAt):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            held.append(len(mixed_layers(model)))

    trainer = mixed_trainer(model, sparse, sentence_rows(), tmp_path, callbacks=[Watch(-1)])
    del sparse
    assert trainer.sparse_bytes == num_bytes
    trainer.train()
    assert held == [12] * 5 + [0] * 3  # p is 0 from step 4.8 of 8 on
    assert trainer.steps == {"mixed": 5, "plain": 3}
    assert {type(layer) for layer in factorized_layers(model).values()} == {LowRankLinear}
    assert all(reference() is None for reference in references)
    model.save_pretrained(tmp_path / "saved")
    inputs = {n: t for n, t in batch().items() if n != "labels"}
    loaded = hf_lowrank.load(tmp_path / "saved")
    assert torch.equal(logits(loaded, inputs), logits(model.eval(), inputs))


def test_spans_and_numbers_train_too(tmp_path: Path):
    config = tiny_bert_classifier().config
    rows = sentence_rows(8)
    spans = [{n: t for n, t in row.items() if n != "labels"} for row in rows]
    for i, row in enumerate(spans):
        row["start_positions"], row["end_positions"] = torch.tensor(i), torch.tensor(i + 1)
    numbers = [{**row, "labels": row["labels"].float()} for row in rows]
    for model_class, outputs, data in (
        (BertForQuestionAnswering, 2, spans),
        (BertForSequenceClassification, 1, numbers),
    ):
        config.num_labels = outputs
        model = build(model_class, config, 0)
        sparse = factorized(model)
        trainer = mixed_trainer(
            model, sparse, data, tmp_path, teacher=build(model_class, config, 1),
            distillation_weight=0.5,
        )  # fmt: skip
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses[-1] < losses[0]


def test_sparse_matrices_stay_as_they_are_while_factors_train(tmp_path: Path):
    model, sparse = cut_bert()
    before = {name: linear_weight(layer).clone() for name, layer in sparse.items()}
    factors = {n: layer.lowrank_A.weight.detach().clone() for n, layer in
               factorized_layers(model).items()}  # fmt: skip
    mixed_trainer(model, sparse, sentence_rows(), tmp_path).train()
    after = factorized_layers(model)
    for name, layer in sparse.items():
        assert torch.equal(linear_weight(layer), before[name])
        assert not torch.equal(after[name].lowrank_A.weight, factors[name])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    changes = {"save_strategy": "steps", "save_steps": 3, "bf16": True}
    states = []
    for folder, callbacks in (("a", []), ("b", [StopAt(4)])):
        model, sparse = cut_bert()
        trainer = mixed_trainer(
            model, sparse, sentence_rows(), tmp_path / folder, callbacks=callbacks, **changes
        )
        if folder == "a":
            trainer.train()
            states.append(model.state_dict())
            continue
        with pytest.raises(InterruptedError):
            trainer.train()
        model, sparse = cut_bert()
        trainer = mixed_trainer(model, sparse, sentence_rows(), tmp_path / folder, **changes)
        trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_wrong_arguments_are_refused(tmp_path: Path):
    for changes, text in (
        ({"sparse_probability": 1.0}, r"sparse_probability must lie in \[0, 1\), got 1.0"),
        ({"mixed_share": 0.0}, r"mixed_share must lie in \(0, 1\], got 0.0"),
        ({"consistency_weight": -1.0}, "consistency_weight must be a number >= 0, got -1.0"),
        ({CHECKPOINTING: True}, "repeats a forward pass"),
        ({"fsdp": "full_shard"}, "runs in one process; start one, without FSDP or DeepSpeed"),
    ):
        with pytest.raises(ConfigError, match=text):
            MixedRankArguments(**settings(tmp_path, **changes))


def test_what_does_not_fit_together_is_refused(tmp_path: Path):
    model, _ = cut_bert()
    with pytest.raises(ConfigError, match="needs MixedRankArguments, got LowRankTraining"):
        MixedRankTrainer(model, arguments(tmp_path))
    llama = tiny_llama()
    with pytest.raises(ConfigError, match="LlamaForCausalLM writes text"):
        mixed_trainer(llama, factorized(llama), sentence_rows(), tmp_path)
    assert not mixed_layers(model)
    assert not mixed_layers(llama)

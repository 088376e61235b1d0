"""`DistillingTrainer`: its loss against one written out, in training and in evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hf_lowrank.errors import ConfigError
from hf_lowrank.training.distillation import DistillationArguments, DistillingTrainer
from hf_lowrank.training.divergence import divergence
from tests.tiny_models import sentence_batches, tiny_bert_classifier, tiny_llama
from tests.training import sentence_rows, settings


def trainer_of(model: Any, folder: Path, teacher: Any = None, **changes: Any) -> DistillingTrainer:
    args = DistillationArguments(**settings(folder, **changes))
    return DistillingTrainer(
        model, args, teacher=teacher, train_dataset=sentence_rows(), eval_dataset=sentence_rows(8)
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_task_s_and_the_teacher_s_by_their_weights(tmp_path: Path, training: bool):
    model, teacher = tiny_bert_classifier(), tiny_bert_classifier(seed=1)
    trainer = trainer_of(model, tmp_path, teacher, distillation_weight=0.25)
    inputs = dict(sentence_batches(1)[0])
    loss = trainer.compute_loss(model.train(training), inputs)
    student = model(**inputs)
    apart = divergence(model, inputs, teacher(**inputs), student, temperature=2.0)
    assert float(apart.detach()) > 1e-3
    torch.testing.assert_close(loss, 0.75 * student.loss + 0.25 * apart)


def test_accumulated_steps_train_like_one_large_batch(tmp_path: Path):
    states = []
    for size, steps in ((4, 1), (1, 4)):
        model = tiny_bert_classifier()
        trainer = trainer_of(
            model, tmp_path, tiny_bert_classifier(seed=1), distillation_weight=0.9, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd",
            warmup_steps=0, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        states.append(model.state_dict())
    before = tiny_bert_classifier().state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in states[0].items())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-6, rtol=1e-4)


def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path):
    model, teacher = tiny_bert_classifier(), tiny_bert_classifier(seed=1)
    trainer = trainer_of(
        model, tmp_path, teacher, distillation_weight=1.0, num_train_epochs=4, learning_rate=3e-3
    )
    before = trainer.evaluate()["eval_loss"]
    kept = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert all(torch.equal(tensor, kept[name]) for name, tensor in teacher.state_dict().items())


def test_without_a_weight_the_teacher_is_left_out(tmp_path: Path):
    model = tiny_bert_classifier()
    trainer = trainer_of(model, tmp_path, tiny_bert_classifier(seed=1))
    inputs = dict(sentence_batches(1)[0])
    assert torch.equal(trainer.compute_loss(model, inputs), model(**inputs).loss)


def test_wrong_arguments_and_teachers_are_refused(tmp_path: Path):
    for changes, text in (
        ({"distillation_weight": 2.0}, r"distillation_weight must lie in \[0, 1\], got 2.0"),
        ({"distillation_temperature": 0.0}, "distillation_temperature must be a number > 0, got 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            DistillationArguments(**settings(tmp_path, **changes))
    model, llama = tiny_bert_classifier(), tiny_llama()
    for student, teacher, text in (
        (model, None, "needs a teacher that is not the model itself"),
        (model, model, "needs a teacher that is not the model itself"),
        (llama, tiny_llama(seed=1), "LlamaForCausalLM writes text"),
    ):
        with pytest.raises(ConfigError, match=text):
            trainer_of(student, tmp_path, teacher, distillation_weight=0.5)
    assert not hasattr(TrainingArguments, "distillation_weight")

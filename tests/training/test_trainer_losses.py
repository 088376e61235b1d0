"""`LowRankTrainer`'s losses: the task's, the penalties', and their sum."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowrank.config import LowRankConfig
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.training.penalties import orthogonality_penalty, rank_penalty
from tests.tiny_models import tiny_bert_classifier, tiny_llama
from tests.training import sentence_rows, text_rows, trainer_for


@pytest.mark.parametrize("kind", ["hoyer", "nuclear"])
def test_the_logged_loss_is_the_weighted_sum_of_its_logged_terms(tmp_path: Path, kind: str):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, learning_rate=1e-2,
        orthogonality_weight=0.7, rank_penalty=kind, rank_penalty_weight=0.01,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 8
    assert logs[-1]["loss_orthogonality"] > 1e-3
    for log in logs:
        total = log["loss_task"] + 0.7 * log["loss_orthogonality"] + 0.01 * log["loss_rank"]
        assert log["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_llama])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_step_on_all_rows_logs_the_loss_of_the_start(
    build: Any, accumulation: int, tmp_path: Path
):
    rows = sentence_rows() if build is tiny_bert_classifier else text_rows()
    model = build()
    task = measure_loss(model, [{k: torch.stack([r[k] for r in rows]) for k in rows[0]}]).mean
    trainer = trainer_for(
        model, rows, tmp_path, max_steps=1, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=16 // accumulation, selection_steps=100,
    )  # fmt: skip
    spectra = rank_penalty(factorized_layers(model).values(), "hoyer").item()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss_task"] == pytest.approx(task, rel=1e-4)
    assert log["loss_rank"] == pytest.approx(spectra, rel=1e-5)
    assert log["loss"] == pytest.approx(task + 1e-3 * spectra, rel=1e-4)


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_llama])
def test_four_small_batches_step_as_one_large_batch(build: Any, tmp_path: Path):
    """Plain SGD, so that a penalty that is scaled wrongly shows; the weights are large."""

    def trained(accumulation: int) -> dict[str, torch.Tensor]:
        rows = sentence_rows() if build is tiny_bert_classifier else text_rows()
        trainer = trainer_for(
            build(), rows, tmp_path, max_steps=2, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=16 // accumulation, selection_steps=100, optim="sgd",
            learning_rate=0.02, rank_penalty="nuclear", rank_penalty_weight=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        return {name: t.clone() for name, t in trainer.model.state_dict().items()}

    whole, parts = trained(1), trained(4)
    start = build().state_dict()
    assert any(n in whole and not torch.equal(whole[n], t) for n, t in start.items())
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=3e-5, rtol=1e-3)


def test_the_penalty_of_a_custom_loss_is_not_multiplied_by_the_accumulation(tmp_path: Path):
    def no_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return 0.0 * outputs["logits"].sum()

    def spectrum(accumulation: int) -> torch.Tensor:
        trainer = trainer_for(
            tiny_bert_classifier(), sentence_rows(), tmp_path, max_steps=1, optim="sgd",
            gradient_accumulation_steps=accumulation, learning_rate=0.02, max_grad_norm=0.0,
            per_device_train_batch_size=16 // accumulation, selection_steps=100,
            rank_penalty="nuclear", rank_penalty_weight=1.0, compute_loss_func=no_loss,
        )  # fmt: skip
        trainer.model_accepts_loss_kwargs = False  # as for a model whose forward takes no kwargs
        trainer.train()
        return next(iter(factorized_layers(trainer.model).values())).lowrank_s.detach()

    torch.testing.assert_close(spectrum(4), spectrum(1))


def test_evaluation_reports_the_task_loss_alone(tmp_path: Path):
    rows = sentence_rows()
    trainer = trainer_for(
        tiny_bert_classifier(), rows, tmp_path, rank_penalty_weight=100.0, eval_dataset=rows
    )
    expected = measure_loss(trainer.model, trainer.selection_batches()).mean
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_spectra_do_not_decay(tmp_path: Path):
    trainer = trainer_for(tiny_bert_classifier(), sentence_rows(), tmp_path, weight_decay=0.1)
    decaying = trainer.get_decay_parameter_names(trainer.model)
    assert not [name for name in decaying if name.endswith("lowrank_s")]
    assert [name for name in decaying if name.endswith("lowrank_A.weight")]


BERT_TARGETS = ["query", "key", "intermediate.dense"]


def test_the_penalties_are_those_of_the_layers(tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, max_steps=1, selection_steps=100,
        lowrank_config=LowRankConfig(target_modules=BERT_TARGETS),
    )  # fmt: skip
    with torch.no_grad():
        for layer in factorized_layers(trainer.model).values():
            layer.lowrank_A.weight.mul_(1.1)
    layers = list(factorized_layers(trainer.model).values())
    assert len(layers) == 6
    expected = orthogonality_penalty(layers).item()
    assert expected == pytest.approx(6 * (1.21 - 1) ** 2 * 32 / 32**2, rel=1e-3)
    trainer.train()
    assert trainer.state.log_history[0]["loss_orthogonality"] == pytest.approx(expected, rel=1e-5)

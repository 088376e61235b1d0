"""`LowRankTrainer` without a head: towards the dense embeddings, or by a loss of one's own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import BertModel, BertPreTrainedModel

import hf_lowrank
from hf_lowrank import EmbeddingLoss, LowRankConfig
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.evaluation.similarity import embeddings
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.measuring.items import ItemLosses
from hf_lowrank.training.trainer import LowRankTrainer
from tests.tiny_models import Batch, snapshot, tiny_bert_classifier, token_batches
from tests.training import (
    Rows,
    StopAt,
    kept_ratio,
    rows_of,
    selection_logs,
    target_shapes,
    trainer_for,
)


def tiny_bert(seed: int = 0) -> BertModel:
    return tiny_bert_classifier(seed).bert


def unlabelled_rows(size: int = 16, seed: int = 0) -> Rows:
    return rows_of(token_batches(size // 4, 4, padding=4, seed=seed))


def distance(model: nn.Module, batches: list[Batch], loss: EmbeddingLoss | None = None) -> float:
    """Mean 1 - cosine to the embeddings of the dense model, whose weights are those of seed 0."""
    loss = loss or EmbeddingLoss()
    dense = embeddings(tiny_bert(), batches, loss)
    return float(1 - (embeddings(model, batches, loss) * dense).sum(1).mean())


@pytest.mark.parametrize("rule", ["price", "relative"])
def test_ranks_fall_and_the_embeddings_stay_near_the_dense_ones(rule: str, tmp_path: Path):
    found = []
    for rate in (1e-3, 1e-9):
        trainer = trainer_for(
            tiny_bert(), unlabelled_rows(32), tmp_path, learning_rate=rate, selection_rule=rule,
            target_param_ratio=0.3, num_train_epochs=6,
        )  # fmt: skip
        shapes = target_shapes(trainer)
        trainer.train()
        assert 0.27 < kept_ratio(trainer.export(), shapes) <= 0.3
        assert selection_logs(trainer)[0] > 0.5
        found.append(distance(trainer.model, token_batches(8, 4, padding=4)))
    trained, cut = found
    assert 1e-3 < trained < 0.9 * cut


def test_the_loss_is_one_minus_the_cosine_in_training_and_evaluation(tmp_path: Path):
    rows, batch = unlabelled_rows(), token_batches(4, 4, padding=4)
    trainer = trainer_for(
        tiny_bert(), rows, tmp_path, eval_dataset=rows, target_param_ratio=0.3, max_steps=1,
        per_device_train_batch_size=16, learning_rate=1e-12,
    )  # fmt: skip
    trainer.train()
    after = distance(trainer.model, batch)
    assert after > 0.01
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-3)
    trainer.train()
    assert trainer.state.log_history[0]["loss_task"] == pytest.approx(after, rel=1e-3)
    found = trainer.predict(rows)
    assert found.metrics["test_loss"] == pytest.approx(after, rel=1e-3)
    assert found.predictions.mean() == pytest.approx(after, rel=1e-3)
    assert found.label_ids.shape == (16, 32)


@pytest.mark.parametrize("rule", ["price", "relative"])
def test_a_tolerance_is_a_rise_of_one_minus_the_cosine(rule: str, tmp_path: Path):
    rows = unlabelled_rows(32)
    trainer = trainer_for(
        tiny_bert(), rows, tmp_path, selection_rule=rule, selection_tolerance=0.02,
        learning_rate=1e-9, num_train_epochs=1,
    )  # fmt: skip
    trainer.train()
    (record,) = trainer.selections
    assert record.loss_before == pytest.approx(0, abs=1e-5)
    feasible = [probe.measured for probe in record.probes if probe.feasible]
    batches = [{name: torch.stack([row[name] for row in rows]) for name in rows[0]}]
    assert distance(trainer.model, batches) == pytest.approx(feasible[-1], abs=1e-4)
    assert 0.002 < feasible[-1] <= 0.02
    assert trainer.param_ratio() < 1


def test_prices_are_the_curvature_of_the_embedding_whatever_the_teacher(tmp_path: Path):
    """At the start the goal is met, so that gradients towards it are nothing."""
    other = tiny_bert(seed=1)
    plans = []
    for settings in ({}, {"teacher": other}, {"teacher": other, "selection_labels": "data"}):
        trainer = trainer_for(
            tiny_bert(), unlabelled_rows(), tmp_path, selection_rule="price",
            target_param_ratio=0.5, **settings,
        )  # fmt: skip
        trainer.state.max_steps, trainer.state.global_step = 8, 8
        plans.append(trainer.select_ranks().plan.ranks)
    assert plans[0] == plans[1] != plans[2]
    assert len(set(plans[0].values())) > 3


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_another_pooling_and_a_teacher_of_ones_own(pooling: str, tmp_path: Path):
    loss, rows, teacher = EmbeddingLoss(pooling), unlabelled_rows(), tiny_bert(seed=1)
    trainer = trainer_for(
        tiny_bert(), rows, tmp_path, eval_dataset=rows, loss_function=loss, teacher=teacher
    )
    batches, kept = token_batches(4, 4, padding=4), snapshot(teacher)
    both = [embeddings(model, batches, loss) for model in (trainer.model, teacher)]
    apart = float(1 - (both[0] * both[1]).sum(1).mean())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(apart, rel=1e-3)
    trainer.train()
    assert trainer.teacher is teacher
    assert all(torch.equal(tensor, kept[name]) for name, tensor in teacher.state_dict().items())


def labelled(rows: Rows, model: nn.Module) -> Dataset:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    goal = EmbeddingLoss().embed(model, batch).detach()
    return Dataset.from_dict({name: t.tolist() for name, t in {**batch, "labels": goal}.items()})


def test_embeddings_as_labels_take_the_place_of_a_teacher(tmp_path: Path):
    rows = labelled(unlabelled_rows(), tiny_bert(seed=1))
    ends = []
    for data, settings in (
        (rows, {}),
        (unlabelled_rows(), {"teacher": tiny_bert(seed=1)}),
    ):
        trainer = trainer_for(
            tiny_bert(), data, tmp_path, eval_dataset=data, selection_rule="price",
            target_param_ratio=0.5, **settings,
        )  # fmt: skip
        trainer.train()
        ends.append((trainer.evaluate()["eval_loss"], trainer.selections[-1].ranks))
        assert (trainer.teacher is None) == (data is rows)
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert ends[0][1] == ends[1][1]
    trainer = trainer_for(tiny_bert(), rows, tmp_path, eval_dataset=unlabelled_rows())
    with pytest.raises(DataError, match="embeddings as labels, and these rows have none; add them"):
        trainer.evaluate()


def test_a_killed_run_goes_on_towards_the_same_embeddings(tmp_path: Path):
    settings: dict[str, Any] = {
        "target_param_ratio": 0.3, "selection_rule": "price", "save_strategy": "steps",
        "save_steps": 4,
    }  # fmt: skip
    whole = trainer_for(tiny_bert(), unlabelled_rows(), tmp_path / "whole", **settings)
    whole.train()
    killed = trainer_for(
        tiny_bert(), unlabelled_rows(), tmp_path, callbacks=[StopAt(6)], **settings
    )
    with pytest.raises(InterruptedError):
        killed.train()
    again = trainer_for(tiny_bert(), unlabelled_rows(), tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    one, other = whole.model.state_dict(), again.model.state_dict()
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    weights = (tmp_path / "checkpoint-4" / "model.safetensors").stat().st_size
    assert weights < 1.3 * sum(4 * t.numel() for t in killed.model.state_dict().values())
    again.export().save_pretrained(tmp_path / "small")
    loaded, batches = hf_lowrank.load(tmp_path / "small"), token_batches(2, seed=5)
    assert type(loaded) is BertModel
    assert factorized_layers(loaded)
    for model in (loaded, again.model):
        assert distance(model, batches) == pytest.approx(distance(loaded, batches), abs=1e-6)


def test_accumulated_steps_train_like_one_large_batch(tmp_path: Path):
    states = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = trainer_for(
            tiny_bert(), unlabelled_rows(), tmp_path, teacher=tiny_bert(seed=1), max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd",
            learning_rate=0.1, max_grad_norm=0.0, rank_penalty_weight=0.0, selection_steps=100,
        )  # fmt: skip
        start = snapshot(trainer.model)
        trainer.train()
        states.append(snapshot(trainer.model))
    assert any(not torch.equal(tensor, start[name]) for name, tensor in states[0].items())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=1e-3)


# Losses of one's own


def alike(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """How alike the sentences of a batch are: a loss of all of them together."""
    found = F.normalize(outputs.last_hidden_state.mean(dim=1), dim=1)
    return (found @ found.T - torch.eye(len(found))).square().mean()


@pytest.mark.parametrize("rule", ["price", "relative"])
def test_a_loss_of_outputs_trains_and_selects_a_model_without_a_head(rule: str, tmp_path: Path):
    rows = unlabelled_rows()
    trainer = trainer_for(
        tiny_bert(), rows, tmp_path, compute_loss_func=alike, selection_rule=rule,
        selection_tolerance=0.05, tolerance_reference="current", learning_rate=3e-3,
        num_train_epochs=4, eval_dataset=rows,
    )  # fmt: skip
    assert trainer.teacher is None
    whole = trainer._measure(trainer.selection_batches()).mean
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-4)
    batches = trainer.selection_batches()
    with torch.no_grad():
        losses = [float(alike(trainer.model(**batch), None)) for batch in batches]
    assert trainer._measure(batches).mean == pytest.approx(sum(losses) / 4, rel=1e-5)
    trainer.train()
    logs = [log["loss_task"] for log in trainer.state.log_history if "loss_task" in log]
    assert sum(logs[-4:]) < 0.9 * sum(logs[:4])
    assert all(record.loss_before is not None for record in trainer.selections)
    assert trainer.param_ratio() < 1


class Pairs(BertPreTrainedModel):
    """What users wrap around an encoder to train it: two texts in, a loss out."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, other_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        one, other = (
            F.normalize(self.bert(ids).last_hidden_state.mean(dim=1), dim=1)
            for ids in (input_ids, other_ids)
        )
        return {"loss": F.cross_entropy(20 * one @ other.T, torch.arange(len(one)))}


def loss_of_pairs(model: nn.Module, batch: Batch) -> ItemLosses:
    size = torch.tensor([len(batch["input_ids"])])
    return ItemLosses(model(**batch)["loss"][None] * size, size)


@pytest.mark.parametrize("rule", ["price", "relative"])
def test_a_model_around_the_encoder_with_its_loss_function(rule: str, tmp_path: Path):
    model, rows = Pairs(tiny_bert().config), unlabelled_rows()
    pairs = [
        {"input_ids": one["input_ids"], "other_ids": other["input_ids"]}
        for one, other in zip(rows, unlabelled_rows(seed=1), strict=True)
    ]
    trainer = trainer_for(
        model, pairs, tmp_path, loss_function=loss_of_pairs, selection_rule=rule,
        target_param_ratio=0.5, learning_rate=3e-3, num_train_epochs=6, eval_dataset=pairs,
    )  # fmt: skip
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * start
    trainer.export()
    assert trainer.param_ratio() <= 0.5
    assert factorized_layers(model.bert)


def test_a_subclass_that_takes_labels_is_trained_by_its_own_loss(tmp_path: Path):
    class Scored(BertModel):
        def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
            found = super().forward(input_ids, attention_mask).last_hidden_state
            return {"loss": (found[:, 0, 0] - labels).square().mean()}

    rows = [
        {**row, "labels": torch.tensor(float(i % 2))} for i, row in enumerate(unlabelled_rows())
    ]
    trainer = trainer_for(Scored(tiny_bert().config), rows, tmp_path, eval_dataset=rows)
    assert trainer.loss_function is trainer.teacher is None
    whole = trainer._measure(trainer.selection_batches())
    assert whole.positions == 16
    assert whole.mean == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


# What is refused


def test_where_there_is_nothing_to_train_towards(tmp_path: Path):
    model, rows = tiny_bert(), unlabelled_rows()
    batches = token_batches(4, padding=4)
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.5), batches, progress=False)
    before = snapshot(model)
    message = "^BertModel: is compressed already, so its own embeddings are no goal; pass the dense"
    with pytest.raises(ConfigError, match=message):
        trainer_for(model, rows, tmp_path)
    assert torch.equal(
        before["embeddings.word_embeddings.weight"], model.get_input_embeddings().weight
    )
    assert snapshot(model).keys() == before.keys()
    trainer = trainer_for(model, rows, tmp_path, teacher=tiny_bert(), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] > 1e-3


def test_losses_and_teachers_that_do_not_fit(tmp_path: Path):
    rows, model = unlabelled_rows(), tiny_bert()
    for changes, message in (
        (
            {"loss_function": EmbeddingLoss(), "compute_loss_func": alike},
            "loss_function and compute_loss_func are two losses; give the one to train by",
        ),
        ({"teacher": model}, "The teacher can't be the model itself, which changes; copy it first"),
        (
            {"teacher": tiny_bert(1), "compute_loss_func": alike},
            "BertModel: a teacher gives embeddings to train towards, and this training has another",
        ),
    ):
        before = snapshot(model)
        with pytest.raises(ConfigError, match=message):
            trainer_for(model, rows, tmp_path, **changes)
        assert snapshot(model).keys() == before.keys()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor(1), r"labels of shape \(4,\) are no embeddings: this model gives \(4, 32\)"),
        (torch.zeros(8), r"labels of shape \(4, 8\) are no embeddings: this model gives \(4, 32\)"),
    ],
    ids=["a class", "another size"],
)
def test_labels_that_are_no_embeddings_are_refused_before_the_first_step(
    labels: torch.Tensor, message: str, tmp_path: Path
):
    rows = [{**row, "labels": labels} for row in unlabelled_rows()]
    trainer = trainer_for(tiny_bert(), rows, tmp_path)
    with pytest.raises(DataError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_copy_that_teaches_is_no_part_of_the_model(tmp_path: Path):
    model = tiny_bert()
    trainer = trainer_for(model, unlabelled_rows(), tmp_path)
    assert isinstance(trainer, LowRankTrainer)
    assert trainer.teacher is not model
    assert not factorized_layers(trainer.teacher)
    kept = copy.deepcopy(trainer.teacher.state_dict())
    trainer.train()
    assert all(torch.equal(t, kept[name]) for name, t in trainer.teacher.state_dict().items())
    assert not any("teacher" in name for name in model.state_dict())

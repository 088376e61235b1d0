"""`LowRankTrainer`'s cuts: within the tolerance, to the target size, and when."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.evaluation.perplexity import LossMeasurement, measure_loss
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.ranks.plan import RankPlan
from tests.tiny_models import equal_states, snapshot, tiny_bert_classifier, tiny_llama
from tests.training import (
    kept_ratio,
    run_to_the_end,
    selection_logs,
    sentence_rows,
    target_shapes,
    text_rows,
    trainer_for,
)


def test_selection_batches_are_a_fixed_subset_with_every_row_once(tmp_path: Path):
    rows = sentence_rows()
    trainer = trainer_for(tiny_bert_classifier(), rows, tmp_path, selection_samples=10, seed=3)
    first, second = trainer.selection_batches(), trainer.selection_batches()
    assert [len(batch["input_ids"]) for batch in first] == [4, 4, 2]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    tokens = torch.cat([batch["input_ids"] for batch in first])
    known = [tuple(row["input_ids"].tolist()) for row in rows]
    places = [known.index(tuple(row.tolist())) for row in tokens]
    assert len(set(places)) == 10
    everything = trainer_for(tiny_bert_classifier(), rows, tmp_path, selection_samples=0)
    assert sum(len(batch["input_ids"]) for batch in everything.selection_batches()) == 16


@pytest.mark.parametrize("rule", ["relative", "price"])
@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_llama])
def test_a_selection_cuts_and_stays_within_the_tolerance(build: Any, rule: str, tmp_path: Path):
    is_bert = build is tiny_bert_classifier
    rows, tolerance = (sentence_rows(), 0.06) if is_bert else (text_rows(), 0.3)
    trainer = trainer_for(
        build(), rows, tmp_path, selection_rule=rule, selection_tolerance=tolerance,
        tolerance_reference="current",
    )  # fmt: skip
    batches = trainer.selection_batches()
    before = measure_loss(trainer.model, batches).mean
    found = trainer.select_ranks()
    after = measure_loss(trainer.model, batches).mean
    assert after <= before + tolerance + 1e-4
    assert any(probe.feasible for probe in found.probes)
    chosen = min((p for p in found.probes if p.feasible), key=lambda probe: probe.param_ratio)
    assert chosen.measured == pytest.approx(after - before, abs=2e-4)
    assert found.plan.param_ratio == chosen.param_ratio < 1.0
    for name, layer in factorized_layers(trainer.model).items():
        assert layer.rank == (found.plan.ranks[name] or min(linear_shape(layer)))


def test_a_run_cuts_at_every_epochs_end_and_stays_within_the_tolerance(tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, selection_tolerance=0.05,
        num_train_epochs=3, tolerance_reference="best", rank_penalty="nuclear",
        rank_penalty_weight=0.01,
    )  # fmt: skip
    trainer.train()
    assert [record.epoch for record in trainer.selections] == [1.0, 2.0, 3.0]
    ratios = selection_logs(trainer)
    assert ratios == [record.param_ratio for record in trainer.selections]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1.0
    after = measure_loss(trainer.model, trainer.selection_batches()).mean
    best = min(record.loss_before for record in trainer.selections)
    assert after <= best + 0.05 + 1e-4


def test_a_rise_is_refused_and_a_fall_is_welcome(tmp_path: Path, monkeypatch: Any):
    trainer = trainer_for(tiny_bert_classifier(), sentence_rows(), tmp_path)
    real = trainer._measure

    def shifted(by: float) -> Any:
        def measure(batches: Any) -> Any:
            found = real(batches)
            return type(found)(tuple((total + by * count, count) for total, count in found.items))

        return measure

    monkeypatch.setattr(trainer, "_measure", shifted(-50.0))  # everything is a rise
    trainer.reference = None
    refused = trainer.select_ranks()
    assert not any(probe.feasible for probe in refused.probes)
    assert all(layer.rank == 32 for layer in factorized_layers(trainer.model).values())
    monkeypatch.setattr(trainer, "_measure", shifted(50.0))  # everything is a fall
    trainer.reference = None
    welcome = trainer.select_ranks()
    assert all(probe.feasible and probe.measured < 0 for probe in welcome.probes)
    assert welcome.plan.param_ratio < 0.1


@pytest.mark.parametrize(
    ("kind", "losses"),
    [("start", [3.0, 3.0, 3.0]), ("best", [3.0, 2.0, 2.0]), ("current", [3.0, 2.0, 4.0])],
)
def test_what_the_tolerance_is_measured_from(kind: str, losses: list[float], tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, tolerance_reference=kind
    )
    found = [
        LossMeasurement(tuple(trainer._update_reference(LossMeasurement(((2 * v, 2), (v, 1))))))
        for v in (3.0, 2.0, 4.0)
    ]
    assert [measurement.mean for measurement in found] == losses


@pytest.mark.parametrize("kind", ["start", "best"])
def test_the_reference_is_measured_before_the_first_step(kind: str, tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, tolerance_reference=kind,
        learning_rate=0.05, max_steps=2, num_train_epochs=1,
    )  # fmt: skip
    start = measure_loss(trainer.model, trainer.selection_batches())
    trainer.train()
    if kind == "start":
        assert [tuple(item) for item in trainer.reference] == list(start.items)
    reference = sum(item[0] for item in trainer.reference) / 16
    assert reference <= start.mean + 1e-6


@pytest.mark.parametrize("goal", [{}, {"target_param_ratio": 0.5, "selection_rule": "price"}])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["input_ids"].fill_(5000), r"selection, batch 0, row 3: token id 5000 is"),
        (lambda row: row.pop("labels"), "labels"),
    ],
)
def test_rows_that_no_selection_can_read_are_refused_before_the_first_step(
    change: Any, message: str, goal: dict[str, Any], tmp_path: Path
):
    rows = sentence_rows(4)
    for row in rows[3:] if "token" in message else rows:
        change(row)
    trainer = trainer_for(
        tiny_bert_classifier(), rows, tmp_path, tolerance_reference="current", **goal
    )
    before = snapshot(trainer.model)
    with pytest.raises(DataError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert equal_states(snapshot(trainer.model), before)


@pytest.mark.parametrize("rule", ["relative", "price"])
@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_llama])
def test_a_target_size_is_reached_and_never_exceeded(build: Any, rule: str, tmp_path: Path):
    rows = sentence_rows() if build is tiny_bert_classifier else text_rows()
    trainer = trainer_for(
        build(), rows, tmp_path, target_param_ratio=0.4, num_train_epochs=3, selection_rule=rule
    )
    shapes = target_shapes(trainer)
    trainer.train()
    ratios = selection_logs(trainer)
    assert ratios[0] > 0.5
    assert ratios == sorted(ratios, reverse=True)
    trainer.export()
    assert 0.35 < kept_ratio(trainer.model, shapes) <= 0.4 + 1e-2  # spectra are gone
    assert kept_ratio(trainer.model, shapes) <= 0.4


@pytest.mark.parametrize(
    "schedule",
    [
        {"num_train_epochs": 1},
        {"num_train_epochs": 0.5},
        {"num_train_epochs": 1.5},
        {"max_steps": 6},
        {"num_train_epochs": 2, "selection_steps": 2},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_a_target_size_is_reached_under_any_schedule(schedule: dict[str, Any], tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, target_param_ratio=0.5, **schedule
    )
    shapes = target_shapes(trainer)
    trainer.train()
    trainer.export()
    assert 0.45 < kept_ratio(trainer.model, shapes) <= 0.5


def test_a_target_size_is_met_when_layers_are_multiplied_out_on_the_way(tmp_path: Path):
    model = tiny_bert_classifier()
    for layer in model.bert.encoder.layer:  # flat spectra: the last to be cut
        nn.init.orthogonal_(layer.attention.self.query.weight)
        nn.init.orthogonal_(layer.attention.self.key.weight)
    trainer = trainer_for(
        model, sentence_rows(), tmp_path, target_param_ratio=0.4, num_train_epochs=4,
        break_even="dense",
    )  # fmt: skip
    shapes = target_shapes(trainer)
    trainer.train()
    trainer.export()
    assert any(rank is None for rank in trainer.selections[0].ranks.values())
    assert trainer.selections[-1].param_ratio == kept_ratio(trainer.model, shapes) <= 0.4


def test_no_selection_goes_below_the_smallest_share(tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, selection_tolerance=1000.0,
        smallest_ratio=0.5,
    )  # fmt: skip
    assert trainer.select_ranks().plan.param_ratio > 0.45  # a component is less than 0.01


def test_plans_count_what_the_trainer_logs(tmp_path: Path):
    trainer = run_to_the_end(tmp_path, target_param_ratio=0.5, num_train_epochs=1)
    record = trainer.selections[-1]
    shapes = target_shapes(trainer)
    trainer.export()
    plan = RankPlan(
        {n: getattr(trainer.model.get_submodule(n), "rank", None) for n in shapes}, shapes
    )
    assert record.param_ratio == plan.param_ratio == kept_ratio(trainer.model, shapes)


def test_a_selection_that_never_comes_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, selection_steps=99, max_steps=4
    )
    trainer.train()
    assert "selection_steps 99 is more than the training's 4 steps" in caplog.text


def test_a_target_that_is_reached_is_not_selected_for_again(tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path,
        target_param_ratio=0.5, num_train_epochs=6, selection_rule="price",
    )  # fmt: skip
    trainer.train()
    assert len(trainer.selections) == 4  # two thirds of six epochs
    assert trainer.param_ratio() <= 0.5


# Layers above break-even


def test_waiting_layers_stay_factorized_and_are_exported_dense(tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, selection_tolerance=1e-6,
        break_even="wait", tolerance_reference="current",
    )  # fmt: skip
    plan = trainer.select_ranks().plan
    waiting = [name for name, rank in plan.ranks.items() if rank is None]
    assert waiting
    assert set(factorized_layers(trainer.model)) == set(trainer.lowrank_shapes)
    trainer.export()
    assert all(isinstance(trainer.model.get_submodule(name), nn.Linear) for name in waiting)


def test_layers_multiplied_out_train_on(tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, break_even="dense",
        selection_tolerance=0.02, num_train_epochs=3,
    )  # fmt: skip
    first: dict[str, torch.Tensor] = {}

    class Note(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                for name in list(trainer.lowrank_shapes):
                    layer = trainer.model.get_submodule(name)
                    if isinstance(layer, nn.Linear):
                        first[name] = layer.weight.detach().clone()

    trainer.add_callback(Note())
    trainer.train()
    assert first
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    for name, weight in first.items():
        now = trainer.model.get_submodule(name)
        assert now.weight.requires_grad
        assert not torch.equal(now.weight, weight)
        assert now.training == trainer.model.training


def test_training_goes_on_when_every_layer_has_become_dense(tmp_path: Path):
    model = tiny_bert_classifier()
    trainer = trainer_for(
        model, sentence_rows(), tmp_path, break_even="dense", tolerance_reference="start"
    )
    start = measure_loss(model, trainer.selection_batches())
    trainer.reference = [(total - 50.0, count) for total, count in start.items]  # all is a rise
    trainer.train()
    assert trainer.state.global_step == 8
    assert not factorized_layers(model)


@pytest.mark.parametrize("rule", ["relative", "price"])
def test_nothing_is_selected_after_the_export(rule: str, tmp_path: Path):
    """Its layers have no spectrum left to cut; they are as they are to be shipped."""
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, target_param_ratio=0.5,
        selection_rule=rule, num_train_epochs=1,
    )  # fmt: skip
    trainer.train()
    exported = {n: t.clone() for n, t in trainer.export().state_dict().items()}
    assert factorized_layers(trainer.model)
    done = len(trainer.selections)
    trainer.args.target_param_ratio = None  # else the size that was due is a reason, too
    assert trainer.select_ranks() is None
    assert len(trainer.selections) == done
    after = trainer.model.state_dict()
    assert list(after) == list(exported)
    assert all(torch.equal(after[name], tensor) for name, tensor in exported.items())


def test_a_cut_that_can_not_be_computed_names_the_layer_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = sentence_rows()
    trainer = trainer_for(tiny_bert_classifier(), rows, tmp_path, selection_tolerance=1.0)
    monkeypatch.setattr(
        "hf_lowrank.training.trainer.cut_factors",
        lambda factors, rank: (factors.left[:, :rank] * torch.nan,) * 3,
    )
    with pytest.raises(NumericalError) as raised:
        trainer.select_ranks()
    name, _, rest = str(raised.value).partition(": ")
    assert name in target_shapes(trainer)
    assert rest == f"its factors are singular, or hold NaN or infinity. {trainer.advice}"

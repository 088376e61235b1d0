"""`LowRankTrainer`: its losses, its cuts, and what a checkpoint has to bring back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

import hf_lowrank
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError, DataError, NumericalError
from hf_lowrank.evaluation.perplexity import LossMeasurement, measure_loss
from hf_lowrank.losses import hidden_states
from hf_lowrank.modeling_lowrank import break_even_rank, linear_shape
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.surgery import factorized_layers
from hf_lowrank.training.penalties import orthogonality_penalty, rank_penalty
from hf_lowrank.training.trainer import LowRankTrainer
from tests.tiny_models import (
    logits,
    sentence_batches,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)
from tests.training import arguments, sentence_rows, text_rows, trainer_for

BERT_TARGETS = ["query", "key", "intermediate.dense"]


def kept_ratio(model: nn.Module, shapes: dict[str, tuple[int, int]]) -> float:
    """Parameters of the named layers now, as a share of the dense ones, counted one by one."""
    kept = 0
    for name in shapes:
        layer = model.get_submodule(name)
        kept += sum(p.numel() for n, p in layer.named_parameters() if not n.endswith("bias"))
    return kept / sum(rows * columns for rows, columns in shapes.values())


def target_shapes(trainer: LowRankTrainer) -> dict[str, tuple[int, int]]:
    return {n: linear_shape(trainer.model.get_submodule(n)) for n in list(trainer.lowrank_shapes)}


def selection_logs(trainer: LowRankTrainer) -> list[float]:
    return [log["param_ratio"] for log in trainer.state.log_history if "param_ratio" in log]


class StopAt(TrainerCallback):
    """Ends a run after a step, as a kill would, but before the epoch's end is reached."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


class PoisonAt(TrainerCallback):
    """Puts a NaN into the model before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            with torch.no_grad():
                kwargs["model"].classifier.weight[0, 0] = math.nan


# The start


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_llama, tiny_gpt2])
def test_a_full_rank_start_leaves_the_outputs(build: Any, tmp_path: Path):
    model = build()
    (batch,) = token_batches(1)
    before = logits(model, batch)
    trainer = trainer_for(model, text_rows(4), tmp_path)
    torch.testing.assert_close(logits(model, batch), before, atol=2e-5, rtol=1e-4)
    assert len(list(trainer.lowrank_shapes)) >= 8
    assert all(
        layer.rank == min(layer.out_features, layer.in_features) and layer.form == "usv"
        for layer in factorized_layers(model).values()
    )


def test_fixed_ranks_hold_from_the_start(tmp_path: Path):
    config = LowRankConfig(
        target_modules=["query", "key"],
        rank_pattern={"query": 5, "layer.0.attention.self.key": None},
    )
    trainer = trainer_for(tiny_bert_classifier(), sentence_rows(), tmp_path, lowrank_config=config)
    ranks = {n.split("encoder.")[1]: m.rank for n, m in factorized_layers(trainer.model).items()}
    assert ranks == {
        "layer.0.attention.self.query": 5,
        "layer.1.attention.self.query": 5,
        "layer.1.attention.self.key": 32,
    }


def test_plain_training_arguments_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs LowRankTrainingArguments, got TrainingArguments"):
        LowRankTrainer(
            tiny_bert_classifier(),
            TrainingArguments(output_dir=str(tmp_path)),
            train_dataset=sentence_rows(),
        )


def test_a_training_set_is_needed(tmp_path: Path):
    with pytest.raises(DataError, match="needs a train_dataset"):
        LowRankTrainer(tiny_bert_classifier(), arguments(tmp_path))


# The loss


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


# Selections


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
    assert [record["epoch"] for record in trainer.selections] == [1.0, 2.0, 3.0]
    ratios = selection_logs(trainer)
    assert ratios == [record["param_ratio"] for record in trainer.selections]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1.0
    after = measure_loss(trainer.model, trainer.selection_batches()).mean
    best = min(record["loss_before"] for record in trainer.selections)
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
    assert any(rank is None for rank in trainer.selections[0]["ranks"].values())
    assert trainer.selections[-1]["param_ratio"] == kept_ratio(trainer.model, shapes) <= 0.4


def test_no_selection_goes_below_the_smallest_share(tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, selection_tolerance=1000.0,
        smallest_ratio=0.5,
    )  # fmt: skip
    assert trainer.select_ranks().plan.param_ratio > 0.45  # a component is less than 0.01


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


# Checkpoints


def run_to_the_end(folder: Path, **changes: Any) -> LowRankTrainer:
    trainer = trainer_for(tiny_bert_classifier(), sentence_rows(), folder, **changes)
    trainer.train()
    return trainer


def resumed(folder: Path, kill_at: int, checkpoint: int, **changes: Any) -> LowRankTrainer:
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), folder, callbacks=[StopAt(kill_at)], **changes
    )
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer = trainer_for(tiny_bert_classifier(), sentence_rows(), folder, **changes)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{checkpoint}"))
    return trainer


def assert_same_end(one: LowRankTrainer, other: LowRankTrainer) -> None:
    ranks = [{n: m.rank for n, m in factorized_layers(t.model).items()} for t in (one, other)]
    assert ranks[0] == ranks[1]
    first, second = one.model.state_dict(), other.model.state_dict()
    assert list(first) == list(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []
    strip = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in t.selections] for t in (one, other)
    ]
    assert json.dumps(strip[0]) == json.dumps(strip[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"selection_rule": "relative", "selection_tolerance": 0.02},
        {"selection_rule": "price", "selection_tolerance": 0.02},
        {"selection_rule": "relative", "target_param_ratio": 0.4},
        {"selection_rule": "price", "target_param_ratio": 0.6, "break_even": "dense"},
        {"tolerance_reference": "start", "selection_tolerance": 0.02, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_a_killed_and_resumed_run_ends_like_an_uninterrupted_one(
    changes: dict[str, Any], tmp_path: Path
):
    changes = changes | {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3}
    whole = run_to_the_end(tmp_path / "whole", **changes)
    assert selection_logs(whole)[0] < 1.0
    assert_same_end(whole, resumed(tmp_path / "again", kill_at=7, checkpoint=6, **changes))


def test_a_checkpoint_of_an_epochs_end_holds_the_cut_model(tmp_path: Path):
    changes = {"selection_tolerance": 0.02, "num_train_epochs": 3, "save_strategy": "epoch"}
    whole = run_to_the_end(tmp_path / "whole", **changes)
    assert_same_end(whole, resumed(tmp_path / "again", kill_at=6, checkpoint=4, **changes))


def test_a_checkpoint_of_an_epochs_last_step_does_not_lose_the_selection(tmp_path: Path):
    """`save_steps` that fall on the epoch's end save before the selection of that epoch."""
    changes = {
        "selection_tolerance": 0.02, "num_train_epochs": 3, "save_strategy": "steps",
        "save_steps": 4,
    }  # fmt: skip
    whole = run_to_the_end(tmp_path / "whole", **changes)
    assert_same_end(whole, resumed(tmp_path / "again", kill_at=6, checkpoint=4, **changes))


def test_the_best_checkpoint_comes_back_with_its_own_ranks(tmp_path: Path):
    rows = sentence_rows()
    trainer = trainer_for(
        tiny_bert_classifier(), rows, tmp_path, target_param_ratio=0.06, num_train_epochs=3,
        save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_loss", eval_dataset=rows, learning_rate=1e-7,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_llama, tiny_gpt2])
def test_an_export_loads_with_equal_logits(build: Any, tmp_path: Path):
    rows = sentence_rows() if build is tiny_bert_classifier else text_rows()
    trainer = trainer_for(
        build(), rows, tmp_path / "run", target_param_ratio=0.5, num_train_epochs=1
    )
    trainer.train()
    (batch,) = token_batches(1, seed=5)
    training_form = logits(trainer.model.eval(), batch)
    model = trainer.export()
    exported = logits(model, batch)
    torch.testing.assert_close(exported, training_form, atol=2e-4, rtol=1e-3)
    model.save_pretrained(tmp_path / "model")
    loaded = hf_lowrank.load(tmp_path / "model")
    assert torch.equal(logits(loaded, batch), exported)
    assert {m.form for m in factorized_layers(loaded).values()} == {"factors"}
    for layer in factorized_layers(loaded).values():
        assert layer.rank < break_even_rank(layer.out_features, layer.in_features)


def test_the_training_form_saves_and_loads(tmp_path: Path):
    trainer = run_to_the_end(tmp_path / "run", target_param_ratio=0.5, num_train_epochs=1)
    trainer.save_model(str(tmp_path / "model"))
    (batch,) = sentence_batches(1, seed=5)
    loaded = hf_lowrank.load(tmp_path / "model")
    assert {layer.form for layer in factorized_layers(loaded).values()} == {"usv"}
    assert torch.equal(logits(loaded, batch), logits(trainer.model.eval(), batch))


# Other ways to train


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize(
    ("build", "rule"), [(tiny_bert_classifier, "relative"), (tiny_llama, "price")]
)
def test_checkpointed_activations_and_bf16(
    build: Any, rule: str, changes: dict[str, Any], tmp_path: Path
):
    rows = sentence_rows(8) if build is tiny_bert_classifier else text_rows(8)
    trainer = trainer_for(
        build(), rows, tmp_path, selection_rule=rule, target_param_ratio=0.5, **changes
    )
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert trainer.selections[-1]["param_ratio"] <= 0.5
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(tmp_path: Path):
    trainer = trainer_for(
        tiny_bert_classifier(), sentence_rows(), tmp_path, save_strategy="steps", save_steps=2,
        callbacks=[PoisonAt(4)],
    )  # fmt: skip
    with pytest.raises(NumericalError, match=r"loss is nan at step 4; the last checkpoint in"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    loaded = hf_lowrank.load(tmp_path / "checkpoint-2")
    assert all(bool(torch.isfinite(p).all()) for p in loaded.parameters())


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


def test_plans_count_what_the_trainer_logs(tmp_path: Path):
    trainer = run_to_the_end(tmp_path, target_param_ratio=0.5, num_train_epochs=1)
    record = trainer.selections[-1]
    shapes = target_shapes(trainer)
    trainer.export()
    plan = RankPlan(
        {n: getattr(trainer.model.get_submodule(n), "rank", None) for n in shapes}, shapes
    )
    assert record["param_ratio"] == plan.param_ratio == kept_ratio(trainer.model, shapes)


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


def test_the_head_is_known_under_mixed_precision(tmp_path: Path):
    """Accelerate wraps `forward`; the check of the head must look behind that."""
    trainer = trainer_for(tiny_llama(), text_rows(), tmp_path, bf16=True, max_steps=1)
    trainer.train()
    assert "forward" in vars(trainer.model)
    (batch,) = token_batches(1)
    assert hidden_states(trainer.model, batch).shape[:2] == batch["input_ids"].shape

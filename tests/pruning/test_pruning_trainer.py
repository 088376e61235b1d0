"""`PruningTrainer`: straight-through masks, the schedule, checkpoints."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowrank import LowRankConfig
from hf_lowrank.errors import CheckpointError, ConfigError, NumericalError, TargetError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.pruning.masked import MaskedWeights
from hf_lowrank.pruning.pruning_arguments import PruningArguments
from hf_lowrank.pruning.pruning_trainer import STATE_FILE, PruningTrainer
from hf_lowrank.pruning.scores import CRITERIA
from tests.pruning import pruning_trainer
from tests.tiny_models import tiny_bert_classifier, tiny_gpt2
from tests.training import PoisonAt, StopAt, arguments, sentence_rows, settings, text_rows


def density(model: nn.Module) -> float:
    weights = [linear_weight(layer) for layer in find_targets(model, LowRankConfig()).values()]
    kept = sum(int((weight != 0).sum()) for weight in weights)
    return kept / sum(weight.numel() for weight in weights)


def regression_layer() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 4, generator=generator))
    return layer, torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)


# The mask


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_steps_equal_those_written_out_with_autograd(criterion: str):
    """A reference: `mask * W` in the graph, the gradient by the product applied to W."""
    layer, x, y = regression_layer()
    W, mask = layer.weight.detach().clone(), torch.ones(3, 4)
    masked = MaskedWeights({"layer": layer.weight}, criterion)
    reference = CRITERIA[criterion]({"layer": W})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    scores = list(masked.criterion.state.get("scores", {}).values())
    optimizer.add_param_group({"params": scores, "momentum": 0.0})
    velocity = torch.zeros(3, 4)
    for step in range(6):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        masked.before_step_()
        optimizer.step()
        masked.after_step_(0.5 if step % 2 else None)
        product = (W * mask).requires_grad_()
        (gradient,) = torch.autograd.grad((x @ product.T - y).square().mean(), product)
        reference.add("layer", W, gradient, float(mask.mean()))
        velocity = 0.9 * velocity + gradient
        W = W - 0.1 * velocity
        if criterion == "movement":  # as the optimizer below
            own = reference.state["scores"]["layer"]
            own.data -= 0.1 * own.grad
        if step % 2:
            chosen = reference.scores({"layer": W})["layer"]
            mask = (chosen >= chosen.flatten().sort().values[6]).float()
            W = W * mask if criterion == "sensitivity" else W
        torch.testing.assert_close(masked.dense["layer"], W)
        torch.testing.assert_close(layer.weight.detach(), W * mask)
    assert int((layer.weight == 0).sum()) == 6


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_a_dropped_weight_keeps_training_and_may_come_back(criterion: str):
    layer, x, y = regression_layer()
    masked = MaskedWeights({"layer": layer.weight}, criterion)
    trained = [layer.weight, *masked.criterion.state.get("scores", {}).values()]
    optimizer = torch.optim.SGD(trained, lr=0.3)
    chosen, moved = [], []
    for step in range(60):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        masked.before_step_()
        dropped = ~masked.masks["layer"]
        before = masked.dense["layer"][dropped].clone()
        optimizer.step()
        moved.append(bool((layer.weight[dropped] != before).any()))
        masked.after_step_(0.5 if step % 3 == 2 else None)
        chosen.append(masked.masks["layer"].clone())
    returned = [bool((now & ~before).any()) for before, now in itertools.pairwise(chosen)]
    assert all(moved[3:])
    assert any(returned)


def test_sensitivity_sets_what_it_drops_to_zero_and_magnitude_keeps_it():
    for criterion, is_zero in (("sensitivity", True), ("magnitude", False)):
        layer, x, y = regression_layer()
        masked = MaskedWeights({"layer": layer.weight}, criterion)
        (layer(x) - y).square().mean().backward()
        masked.before_step_()
        masked.after_step_(0.5)
        assert bool((masked.dense["layer"][~masked.masks["layer"]] == 0).all()) == is_zero


def test_the_optimizer_s_parameters_stay_the_same_objects():
    layer, x, y = regression_layer()
    before, weight = layer.weight.data_ptr(), layer.weight
    masked = MaskedWeights({"layer": layer.weight}, "movement")
    (layer(x) - y).square().mean().backward()
    masked.before_step_()
    assert layer.weight.data_ptr() != before
    masked.after_step_(0.5)
    assert layer.weight is weight
    assert layer.weight.data_ptr() == before


# Whole runs


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_a_run_ends_at_the_final_density(tmp_path: Path, criterion: str):
    model = tiny_bert_classifier()
    trainer = pruning_trainer(
        model, sentence_rows(), tmp_path, pruning_criterion=criterion, num_train_epochs=3
    )
    trainer.train()
    assert density(model) == pytest.approx(0.25, abs=1e-3)
    assert trainer.weights.density == density(model)
    logged = [log["density"] for log in trainer.state.log_history if "density" in log]
    assert logged[0] > 0.6
    assert logged == sorted(logged, reverse=True)
    layers = find_targets(model, LowRankConfig()).values()
    shares = [float((linear_weight(layer) != 0).float().mean()) for layer in layers]
    assert max(shares) - min(shares) > 0.02  # one threshold over all layers
    untouched = (model.classifier.weight, model.bert.pooler.dense.weight)
    assert all(bool((weight != 0).all()) for weight in untouched)


def test_the_scores_of_movement_are_trained_at_a_rate_of_their_own(tmp_path: Path):
    rates = []

    class Watch(StopAt):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    trainer = pruning_trainer(
        tiny_bert_classifier(), sentence_rows(), tmp_path, pruning_criterion="movement",
        callbacks=[Watch(-1)], lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    assert rates == [[1e-3, 1e-3, 1e-2]] * 8
    scores = trainer.weights.criterion.state["scores"]
    assert all(0.005 < float(values.detach().abs().max()) <= 0.081 for values in scores.values())


def test_conv1d_layers_and_bf16_and_accumulation(tmp_path: Path):
    model = tiny_gpt2()
    trainer = pruning_trainer(
        model, text_rows(), tmp_path, bf16=True, gradient_accumulation_steps=2, final_density=0.5
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert density(model) == pytest.approx(0.5, abs=1e-3)
    means = trainer.weights.criterion.state["mean"].values()
    assert all(mean.dtype == torch.float32 and float(mean.max()) > 0 for mean in means)


def test_accumulated_steps_score_like_one_large_batch(tmp_path: Path):
    scores = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = pruning_trainer(
            tiny_bert_classifier(), sentence_rows(4), tmp_path, num_train_epochs=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        scores.append(trainer.weights.criterion.state["mean"])
    assert max(float(values.abs().max()) for values in scores[0].values()) > 1e-6
    for name, values in scores[0].items():
        torch.testing.assert_close(scores[1][name], values, atol=1e-9, rtol=1e-3)


def test_masks_are_chosen_at_the_interval_and_where_the_cool_down_begins(tmp_path: Path):
    trainer = pruning_trainer(
        tiny_bert_classifier(), sentence_rows(), tmp_path, mask_interval=3, num_train_epochs=4
    )
    trainer.train()
    logged = [log["density"] for log in trainer.state.log_history if "density" in log]
    changes = [i + 1 for i, (a, b) in enumerate(itertools.pairwise([1.0, *logged])) if a != b]
    assert changes == [3, 6, 9, 12]  # 16 steps: the cool-down begins after 11.2
    assert logged[-1] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, criterion: str):
    changes = {
        "save_strategy": "steps", "save_steps": 3, "mask_interval": 2, "bf16": True,
        "pruning_criterion": criterion,
    }  # fmt: skip
    whole = pruning_trainer(tiny_bert_classifier(), sentence_rows(), tmp_path / "a", **changes)
    whole.train()
    killed = pruning_trainer(
        tiny_bert_classifier(), sentence_rows(), tmp_path / "b", callbacks=[StopAt(5)], **changes
    )
    with pytest.raises(InterruptedError):
        killed.train()
    resumed = pruning_trainer(tiny_bert_classifier(), sentence_rows(), tmp_path / "b", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    for name, tensor in whole.weights.state().items():
        assert torch.equal(tensor, resumed.weights.state()[name]), name


def test_a_checkpoint_holds_the_masked_model(tmp_path: Path):
    trainer = pruning_trainer(
        tiny_bert_classifier(), sentence_rows(), tmp_path, save_strategy="epoch"
    )
    trainer.train()
    loaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-8")
    assert density(loaded) == pytest.approx(0.25, abs=1e-3)
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "checkpoint-8" / STATE_FILE).is_file()
    assert not (tmp_path / "final" / STATE_FILE).exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_checkpoint_without_its_pruning_state_is_refused(tmp_path: Path, damage: str):
    changes = {"save_strategy": "epoch", "num_train_epochs": 1}
    pruning_trainer(tiny_bert_classifier(), sentence_rows(), tmp_path, **changes).train()
    path = tmp_path / "checkpoint-4" / STATE_FILE
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        changes["pruning_criterion"] = "magnitude"
    again = pruning_trainer(tiny_bert_classifier(), sentence_rows(), tmp_path, **changes)
    wanted = "does not fit" if damage == "other" else "can't be read"
    with pytest.raises(CheckpointError, match=wanted):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_frozen_layer_has_nothing_to_be_scored_by(tmp_path: Path):
    model = tiny_bert_classifier()
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    with pytest.raises(
        TargetError, match=r"layer\.1\.output\.dense: its weight gets no gradient to score"
    ):
        pruning_trainer(model, sentence_rows(), tmp_path).train()
    trainer = pruning_trainer(model, sentence_rows(), tmp_path, pruning_criterion="magnitude")
    trainer.train()
    assert density(model) == pytest.approx(0.25, abs=1e-3)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path):
    trainer = pruning_trainer(
        tiny_bert_classifier(), sentence_rows(), tmp_path, callbacks=[PoisonAt(3)]
    )
    with pytest.raises(NumericalError, match=r"is nan at step 3; .* Lower the learning rate\.$"):
        trainer.train()


def test_wrong_arguments_are_refused(tmp_path: Path):
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    for changes, text in (
        ({"final_density": 0.0}, r"final_density must lie in \(0, 1\], got 0.0"),
        ({"pruning_warmup": 1.0}, r"pruning_warmup must lie in \[0, 1\), got 1.0"),
        ({"pruning_warmup": 0.6, "pruning_cooldown": 0.4}, "0.6 and pruning_cooldown 0.4 leave"),
        (
            {"pruning_criterion": "size"},
            "must be one of sensitivity, movement, magnitude; got 'size'",
        ),
        ({"mask_interval": 0}, "mask_interval must be an integer >= 1, got 0"),
        (best, "load_best_model_at_end would bring back"),
        ({"fsdp": "full_shard"}, "which FSDP and DeepSpeed shard; leave both off"),
    ):
        with pytest.raises(ConfigError, match=text):
            PruningArguments(**settings(tmp_path, **changes))


def test_other_arguments_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs PruningArguments, got LowRankTrainingArguments"):
        PruningTrainer(tiny_bert_classifier(), arguments(tmp_path))

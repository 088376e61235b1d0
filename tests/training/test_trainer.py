"""`LowRankTrainer`: its start, what a checkpoint has to bring back, and other ways to train."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import TrainingArguments

import hf_lowrank
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError, DataError, NumericalError
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.measuring.causal import hidden_states
from hf_lowrank.ranks.plan import break_even_rank
from hf_lowrank.training.trainer import LowRankTrainer
from tests.tiny_models import (
    logits,
    sentence_batches,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)
from tests.training import (
    CHECKPOINTING,
    PoisonAt,
    StopAt,
    arguments,
    run_to_the_end,
    selection_logs,
    sentence_rows,
    text_rows,
    trainer_for,
)

pytestmark = pytest.mark.oldest

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


def test_a_training_set_of_a_length_is_needed(tmp_path: Path):
    with pytest.raises(DataError, match="needs a train_dataset"):
        LowRankTrainer(tiny_bert_classifier(), arguments(tmp_path))
    rows: Any = iter(sentence_rows())
    with pytest.raises(DataError, match="part of train_dataset; list_iterator has no length"):
        LowRankTrainer(tiny_bert_classifier(), arguments(tmp_path), train_dataset=rows)


# Checkpoints


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
    # As text, since NaN is not equal to itself.
    strip = [[str(replace(r, seconds=0.0)) for r in t.selections] for t in (one, other)]
    assert strip[0] == strip[1]


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
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="older transformers do not tell the sampler which epoch is resumed",
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


@pytest.mark.parametrize("changes", [{CHECKPOINTING: True}, {"bf16": True}], ids=str)
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
    assert trainer.selections[-1].param_ratio <= 0.5
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


def test_the_head_is_known_under_mixed_precision(tmp_path: Path):
    """Accelerate wraps `forward`; the check of the head must look behind that."""
    trainer = trainer_for(tiny_llama(), text_rows(), tmp_path, bf16=True, max_steps=1)
    trainer.train()
    assert "forward" in vars(trainer.model)
    (batch,) = token_batches(1)
    assert hidden_states(trainer.model, batch).shape[:2] == batch["input_ids"].shape

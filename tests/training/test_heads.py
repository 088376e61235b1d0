"""`LowRankTrainer` on numbers, several labels and tokens: trained, cut, evaluated, exported."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hf_lowrank
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.measuring.items import IGNORED
from tests.tiny_heads import HEADS, head_batches, tiny_head
from tests.tiny_models import logits
from tests.training import kept_ratio, rows_of, target_shapes, trainer_for


def written_out(name: str, found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss over what counts."""
    if name == "tokens":
        counted = labels != IGNORED
        return F.cross_entropy(found[counted], labels[counted])
    if name == "several labels":
        return -(F.logsigmoid(found) * labels + F.logsigmoid(-found) * (1 - labels)).mean()
    return (found.squeeze(-1) - labels).square().mean()


@pytest.mark.parametrize("rule", ["price", "relative"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_trained_cut_to_size_and_exported(name: str, rule: str, tmp_path: Path):
    (batch,) = head_batches(name, 1, seed=1, labelled_by=1)
    rows = rows_of([batch, *head_batches(name, 3, labelled_by=1)])
    trainer = trainer_for(
        tiny_head(name), rows, tmp_path / "run", selection_rule=rule, target_param_ratio=0.6,
        num_train_epochs=4, learning_rate=3e-3, eval_dataset=rows[:4],
    )  # fmt: skip
    shapes = target_shapes(trainer)
    start = trainer.evaluate()["eval_loss"]
    wanted = written_out(name, logits(trainer.model, batch), batch["labels"])
    assert start == pytest.approx(float(wanted), rel=1e-4)
    measured = measure_loss(trainer.model, [batch])
    assert measured.mean == pytest.approx(float(wanted), rel=1e-4)
    assert measured.positions == (int((batch["labels"] != -100).sum()) if name == "tokens" else 4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * start
    model = trainer.export()
    assert 0.5 < kept_ratio(model, shapes) <= 0.6
    model.save_pretrained(tmp_path / "model")
    loaded = hf_lowrank.load(tmp_path / "model")
    assert type(loaded) is HEADS[name][0]
    assert factorized_layers(loaded)
    assert torch.equal(logits(loaded, batch), logits(model.eval(), batch))


@pytest.mark.parametrize("name", HEADS)
def test_a_tolerance_holds_for_the_loss_of_a_head(name: str, tmp_path: Path):
    rows = rows_of(head_batches(name))
    trainer = trainer_for(
        tiny_head(name), rows, tmp_path, selection_rule="price", selection_tolerance=0.05,
        tolerance_reference="current",
    )  # fmt: skip
    batches = trainer.selection_batches()
    before = measure_loss(trainer.model, batches).mean
    found = trainer.select_ranks()
    rise = measure_loss(trainer.model, batches).mean - before
    assert 0 != rise <= 0.05 + 1e-4
    assert trainer.param_ratio() < 1
    chosen = min((p for p in found.probes if p.feasible), key=lambda probe: probe.param_ratio)
    assert chosen.measured == pytest.approx(rise, abs=2e-4)


@pytest.mark.parametrize("rule", ["price", "relative"])
def test_ignored_tokens_and_padding_do_not_count(rule: str, tmp_path: Path):
    """Of the same sentences with more padding, and other tokens where that is."""
    plans, losses = [], []
    for padding in (0, 8):
        rows = [
            {
                "input_ids": F.pad(row["input_ids"], (0, padding), value=7),
                "attention_mask": F.pad(row["attention_mask"], (0, padding)),
                "labels": F.pad(row["labels"], (0, padding), value=IGNORED),
            }
            for row in rows_of(head_batches("tokens", labelled_by=1))
        ]
        trainer = trainer_for(
            tiny_head("tokens"), rows, tmp_path, selection_rule=rule, selection_labels="data",
            selection_tolerance=0.05, tolerance_reference="current",
        )  # fmt: skip
        losses.append(trainer._measure(trainer.selection_batches()))
        plans.append(trainer.select_ranks().plan.ranks)
    assert plans[0] == plans[1]
    assert losses[0].positions == losses[1].positions < 16 * 12
    assert losses[0].mean == pytest.approx(losses[1].mean, rel=1e-4)


def test_a_batch_without_a_single_label_adds_nothing(tmp_path: Path):
    rows = rows_of(head_batches("tokens"))
    trainer = trainer_for(tiny_head("tokens"), rows, tmp_path)
    batches = trainer.selection_batches()
    ignored = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORED)}
    found, wanted = (trainer._measure([*extra, *batches[1:]]) for extra in ([ignored], []))
    assert (found.positions, found.mean) == (wanted.positions, wanted.mean)

"""Losses over batches, and what they leave behind."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.evaluation.perplexity import LossMeasurement, iterate_losses, measure_loss
from hf_lowrank.measuring.items import IGNORED, ItemLosses
from hf_lowrank.measuring.losses import item_losses
from tests.tiny_models import sentence_batches, tiny_bert_classifier, tiny_llama, token_batches


def whole_loss(model, batches):
    """Cross-entropy of all scored positions of all batches at once."""
    logits, targets = [], []
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        with torch.no_grad():
            logits.append(model(**batch).logits[:, :-1].flatten(0, 1))
        targets.append(labels[:, 1:].flatten())
    return float(F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=IGNORED))


def uneven_batches():
    """Batches of different sizes and lengths, with padding: their means must not be averaged."""
    return [
        *token_batches(1, 1, 40),
        *token_batches(2, 3, 8, padding=4, seed=1),
        *token_batches(1, 2, 20, seed=2),
    ]


def test_perplexity_is_the_exponential_of_the_mean_over_all_positions():
    model, batches = tiny_llama(), uneven_batches()
    found = measure_loss(model, batches)
    loss = whole_loss(model, batches)
    assert found.mean == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.positions == 39 + 2 * (7 + 7 + 3) + 2 * 19
    mean_of_means = sum(whole_loss(model, [batch]) for batch in batches) / len(batches)
    assert abs(mean_of_means - loss) > 0.01


def test_items_are_sequences_in_order():
    model, batches = tiny_llama(), uneven_batches()
    found = measure_loss(model, batches)
    assert [count for _, count in found.items] == [39, 7, 7, 3, 7, 7, 3, 19, 19]
    single = {name: value[1:2] for name, value in batches[3].items()}
    assert found.items[-1][0] == pytest.approx(19 * whole_loss(model, [single]), rel=1e-5)


def test_perplexity_by_hand():
    measurement = LossMeasurement(((2.0, 1), (4.0, 3)))
    assert (measurement.positions, measurement.mean) == (4, 1.5)
    assert measurement.perplexity == math.exp(1.5)


@pytest.mark.parametrize(("loss", "perplexity"), [(699.0, math.exp(699.0)), (701.0, math.inf)])
def test_perplexity_that_overflows_is_infinite(loss, perplexity):
    assert LossMeasurement(((loss, 1),)).perplexity == perplexity


def test_sentences_are_scored_one_each():
    model, batches = tiny_bert_classifier(), sentence_batches(2, 4)
    found = measure_loss(model, batches)
    with torch.no_grad():
        wanted = sum(float(model(**batch).loss) for batch in batches) / 2
    assert found.positions == 8
    assert found.mean == pytest.approx(wanted, rel=1e-5)


def test_a_loss_function_of_ones_own_is_used():
    def constant(model, batch):
        return ItemLosses(torch.tensor([3.0, 5.0]), torch.tensor([2, 2]))

    found = measure_loss(tiny_llama(), token_batches(3), loss_function=constant)
    assert found.items == ((3.0, 2), (5.0, 2)) * 3
    assert found.mean == 2.0


def nan_in_batch(index):
    calls = iter(range(100))

    def loss(model, batch):
        result = item_losses(model, batch)
        return ItemLosses(result.sums * math.nan, result.counts) if next(calls) == index else result

    return loss


@pytest.mark.parametrize("index", [0, 2])
def test_nan_is_an_error_and_not_a_skipped_batch(index):
    with pytest.raises(
        NumericalError,
        match=f"^The loss of batch {index} is NaN or infinite; load the model in float32",
    ):
        measure_loss(tiny_llama(), token_batches(4), loss_function=nan_in_batch(index))


def test_one_infinite_item_is_an_error():
    def loss(model, batch):
        return ItemLosses(torch.tensor([1.0, math.inf]), torch.tensor([1, 1]))

    with pytest.raises(
        NumericalError, match=r"^The loss of batch 0 is NaN or infinite; load the model in float32"
    ):
        measure_loss(tiny_llama(), token_batches(1), loss_function=loss)


def test_weights_that_are_not_finite_are_an_error():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(
        NumericalError, match=r"^The loss of batch 0 is NaN or infinite; load the model in float32"
    ):
        measure_loss(model, token_batches(2))


@pytest.mark.parametrize(
    "batches",
    [
        [],
        token_batches(2, length=1),
        [{**token_batches(1)[0], "labels": torch.full((2, 16), -100)}],
    ],
    ids=["none", "too short", "all ignored"],
)
def test_nothing_to_score_is_an_error(batches):
    with pytest.raises(
        DataError, match=r"^The evaluation data holds nothing to score; pass texts of two tokens"
    ):
        measure_loss(tiny_llama(), batches)


def noisy_llama():
    return tiny_llama(attention_dropout=0.5)


def test_measuring_is_done_in_evaluation_mode_without_gradients():
    seen = []

    def loss(model, batch):
        seen.append((model.training, model.model.training, torch.is_grad_enabled()))
        return item_losses(model, batch)

    model = noisy_llama().train()
    noisy = measure_loss(model, token_batches(2), loss_function=loss)
    assert seen == [(False, False, False)] * 2
    assert noisy == measure_loss(noisy_llama(), token_batches(2))
    assert torch.is_grad_enabled()


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ending", ["end", "stop", "error"])
def test_the_mode_is_restored(training, ending):
    model = tiny_llama().train(training)
    before = modes(model)
    loss = nan_in_batch(1) if ending == "error" else None
    losses = iterate_losses(model, token_batches(3), loss_function=loss)
    next(losses)
    assert not model.training
    if ending == "end":
        list(losses)
    elif ending == "stop":
        losses.close()
    else:
        with pytest.raises(NumericalError):
            list(losses)
    assert modes(model) == before


def test_layers_with_a_mode_of_their_own_keep_it():
    """Frozen layers that the caller had put into evaluation mode."""
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = modes(model)
    measure_loss(model, token_batches(1))
    assert modes(model) == before


def test_batches_are_read_only_as_far_as_asked():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return item_losses(model, batch)

    losses = iterate_losses(tiny_llama(), token_batches(5), loss_function=loss)
    assert calls == []
    for _ in range(3):
        next(losses)
    assert len(calls) == 2
    losses.close()


def test_progress_does_not_change_the_result(capsys):
    model, batches = tiny_llama(), token_batches(2)
    assert measure_loss(model, batches, progress="text") == measure_loss(model, batches)
    assert capsys.readouterr().out == ""

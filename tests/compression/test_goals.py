"""The goals of a run: a share of the parameters, a loss tolerance, given ranks."""

import pytest

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.measuring.items import ItemLosses
from hf_lowrank.measuring.losses import item_losses
from tests.compression import is_dense, mean_loss
from tests.tiny_models import HIDDEN, equal_states, snapshot, tiny_llama, token_batches


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("metric", ["kfac", "whitened", "plain"])
def test_budget_is_never_exceeded_and_nearly_spent(text, metric, ratio):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=ratio, metric=metric)
    sizes = compress(model, config, text[:4], progress=False).parameters
    budget = ratio * sizes.targeted_dense
    largest_component = HIDDEN + 2 * HIDDEN
    assert budget - largest_component < sizes.targeted_kept <= budget


def test_ratio_of_one_keeps_every_layer_dense(text):
    model = tiny_llama()
    report = compress(model, LowRankConfig(param_ratio=1.0), text[:2], progress=False)
    assert set(report.ranks.values()) == {None}
    assert equal_states(snapshot(model), snapshot(tiny_llama()))


@pytest.mark.parametrize("tolerance", [0.02, 0.2])
def test_loss_tolerance_holds_on_the_held_out_text(text, tolerance):
    model, dense = tiny_llama(), tiny_llama()
    config = LowRankConfig(loss_tolerance=tolerance)
    report = compress(model, config, text[:6], held_out=text[6:10], progress=False)
    rise = mean_loss(model, text[6:10]) - mean_loss(dense, text[6:10])
    assert rise <= tolerance
    assert report.held_out.mean == pytest.approx(rise, abs=1e-5)
    assert report.held_out.complete
    assert report.held_out.items == 16
    assert not is_dense(model)
    assert "search" in report.seconds


def test_search_ends_beside_a_size_that_is_too_small(text):
    config = LowRankConfig(loss_tolerance=0.1)
    report = compress(tiny_llama(), config, text[:6], held_out=text[6:10], progress=False)
    kept = report.parameters.targeted_kept / report.parameters.targeted_dense
    feasible = [probe.param_ratio for probe in report.probes if probe.feasible]
    refused = [probe.param_ratio for probe in report.probes if not probe.feasible]
    assert kept == min(feasible)
    assert 0 < kept - max(refused) < 0.02
    assert all(probe.measured > 0.1 for probe in report.probes if not probe.feasible)


def test_larger_tolerance_gives_a_smaller_model(text):
    kept = [
        compress(
            tiny_llama(),
            LowRankConfig(loss_tolerance=tolerance),
            text[:6],
            held_out=text[6:10],
            progress=False,
        ).parameters.kept
        for tolerance in (0.02, 0.1, 0.4)
    ]
    assert kept[0] > kept[1] > kept[2]


def test_held_out_text_is_taken_off_the_calibration_text(text):
    config = LowRankConfig(loss_tolerance=0.2)
    report = compress(tiny_llama(), config, text[:8], progress=False)
    explicit = compress(tiny_llama(), config, text[:6], held_out=text[6:8], progress=False)
    assert report.data.calibration_tokens == 6 * 4 * 16
    assert report.held_out == explicit.held_out
    assert report.ranks == explicit.ranks


def test_a_tolerance_that_nothing_meets_gives_the_dense_model(text):
    def strict_loss(model, batch):
        losses = item_losses(model, batch)
        return losses if is_dense(model) else ItemLosses(losses.sums + 100.0, losses.counts)

    model = tiny_llama()
    report = compress(
        model,
        LowRankConfig(loss_tolerance=0.0),
        text[:4],
        held_out=text[6:8],
        loss_function=strict_loss,
        progress=False,
    )
    assert set(report.ranks.values()) == {None}
    assert report.held_out.mean == 0
    assert equal_states(snapshot(model), snapshot(tiny_llama()))


def test_a_decision_is_replayed():
    batches = token_batches(4, 2, 16)
    first = compress(tiny_llama(), LowRankConfig(param_ratio=0.6), batches, progress=False)
    assert len(set(first.ranks.values())) > 1
    config = LowRankConfig(metric="plain", ranks=first.ranks)
    assert compress(tiny_llama(), config, progress=False).ranks == first.ranks

"""`compress` on numbers, several labels and tokens."""

import pytest

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.evaluation.perplexity import measure_loss
from tests.tiny_heads import HEADS, head_batches, tiny_head
from tests.tiny_models import logits

pytestmark = pytest.mark.parametrize("name", HEADS)


def test_prices_beat_plain_singular_values_at_a_size(name: str):
    changes = {}
    for metric in ("kfac", "plain"):
        model, batches = tiny_head(name), head_batches(name, 8)
        before = logits(model, batches[0])
        config = LowRankConfig(
            param_ratio=0.5, metric=metric, label_source="model" if metric == "kfac" else "data"
        )
        report = hf_lowrank.compress(model, config, batches, batches, progress=False)
        assert report.parameters.targeted_share <= 0.5
        found = report.evaluation
        assert found.loss_after == pytest.approx(measure_loss(model, batches).mean, rel=1e-4)
        assert found.tokens == (32 if name != "tokens" else 8 * 30)
        changes[metric] = float((logits(model, batches[0]) - before).square().mean())
    assert 0 < changes["kfac"] < 0.9 * changes["plain"]


def test_a_tolerance_is_kept_on_held_out_text(name: str):
    model, batches = tiny_head(name), head_batches(name, 12)
    before = measure_loss(model, batches[8:]).mean
    config = LowRankConfig(loss_tolerance=0.05, label_source="model")
    report = hf_lowrank.compress(model, config, batches[:8], held_out=batches[8:], progress=False)
    rise = measure_loss(model, batches[8:]).mean - before
    assert rise == pytest.approx(report.held_out.mean, abs=1e-4)
    assert rise <= 0.05
    assert report.parameters.targeted_share < 1
    assert report.predicted_loss_difference > 0

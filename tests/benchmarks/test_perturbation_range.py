"""The range of weight noise in which the first-order prediction holds."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.perturbation_range import format_range, linear_range, measure_range
from hf_lowrank import LowRankConfig
from hf_lowrank.compression.gradients import collect_gradients
from hf_lowrank.modeling.targets import find_targets
from tests.compression.analyzed import analyzed
from tests.tiny_models import equal_states, snapshot, tiny_llama, token_batches


def test_predictions_hold_for_small_noise_and_fail_for_large(text):
    model = tiny_llama()
    config = LowRankConfig()
    analysis = analyzed(model, config, text[:4], with_gradients=True)
    plan = analysis.plan_for_ratio(0.4)
    before = snapshot(model)
    points = measure_range(model, analysis, plan, text[:4], scales=(1.0, 1e-3, 1e-2, 0.1))
    assert [point.scale for point in points] == [1e-3, 1e-2, 0.1, 1.0]
    assert points[0].measured == pytest.approx(points[0].first_order, rel=0.2)
    assert abs(points[-1].measured - points[-1].first_order) > 0.5 * abs(points[-1].first_order)
    assert points[0].noise == pytest.approx(points[-1].noise / 1000)
    assert points[0].noise <= linear_range(points) < points[-1].noise
    assert linear_range(points, tolerance=0.0) == 0.0
    assert equal_states(model.state_dict(), before)
    assert len(format_range(points).splitlines()) == 6


def test_gradients_are_those_of_the_mean_loss():
    model, batches = tiny_llama(), token_batches(3)
    targets = find_targets(model, LowRankConfig())
    gradients = collect_gradients(model, targets, batches, LowRankConfig())
    total, count = 0.0, 0
    for batch in batches:
        logits = model(**batch).logits[:, :-1]
        total = total + F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="sum")
        count += batch["input_ids"][:, 1:].numel()
    (total / count).backward()
    for name, layer in targets.items():
        assert torch.allclose(gradients.mean[name], layer.weight.grad, atol=1e-5), name

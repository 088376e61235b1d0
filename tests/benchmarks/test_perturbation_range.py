"""The range of weight noise in which the first-order prediction holds."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.perturbation_range import format_range, linear_range, measure_range
from hf_lowrank import LowRankConfig
from hf_lowrank.compression.analysis import decompose_layers
from hf_lowrank.compression.joint.gradients import GradientReader
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.threshold import plan_for_budget
from tests.tiny_models import equal_states, snapshot, tiny_llama, token_batches


def test_predictions_hold_for_small_noise_and_fail_for_large(text):
    model = tiny_llama()
    config = LowRankConfig()
    targets = find_targets(model, config)
    reader = GradientReader(config)
    moments = reader.collect(model, targets, text[:4])
    spectra, _ = decompose_layers(targets, moments, config, progress=False)
    shapes = {name: spectrum.shape for name, spectrum in spectra.items()}
    plan = plan_for_budget(shapes, spectra, "price", 0.4)
    before = snapshot(model)
    points = measure_range(
        model, spectra, plan, reader.gradients, text[:4], scales=(1.0, 1e-3, 1e-2, 0.1)
    )
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
    targets, reader = find_targets(model, LowRankConfig()), GradientReader(LowRankConfig())
    reader.collect(model, targets, batches)
    total, count = 0.0, 0
    for batch in batches:
        logits = model(**batch).logits[:, :-1]
        total = total + F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="sum")
        count += batch["input_ids"][:, 1:].numel()
    (total / count).backward()
    for name, layer in targets.items():
        assert torch.allclose(reader.gradients[name], layer.weight.grad, atol=1e-5), name

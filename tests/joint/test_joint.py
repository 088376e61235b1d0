"""The joint system: its formulas against explicit ones, its data discipline, and its guarantees."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankLinear
from hf_lowrank.analysis import decompose_layers
from hf_lowrank.convolutions import LinearConv2d, linearize_convolutions_
from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.errors import ConfigError, DataError, NumericalError, TargetError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.held_out import HeldOutLoss
from hf_lowrank.joint.candidates import JointSettings, mean_gradients
from hf_lowrank.joint.disjoint import check_disjoint
from hf_lowrank.joint.first_order import (
    corrected_spectrum,
    first_order_terms,
    retruncation_form,
    trusted_tails,
)
from hf_lowrank.joint.perturbation import format_range, linear_range, measure_range
from hf_lowrank.joint.system import compress_jointly
from hf_lowrank.losses import ItemLosses
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.threshold import plan_for_budget, plan_for_scores
from hf_lowrank.report.table import format_report
from hf_lowrank.targets import find_targets
from tests.scripts import InProcess, make_inputs
from tests.tiny_models import (
    sentence_batches,
    tiny_bert_classifier,
    tiny_llama,
    token_batches,
    written_batches,
)


@pytest.fixture(scope="module")
def text():
    """Twelve batches that the dense model wrote."""
    return written_batches(tiny_llama(), num_batches=12)


def full_form(m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for size in (m, n):
        rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
        matrix = rows.T @ rows
        sides.append(Side(None, SecondMoment(matrix, float(matrix.trace()), size), 0.0))
    return QuadraticForm(*sides, price_scale=0.5)


def random_layer(m, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(2)]


# The formulas


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_first_order_terms_are_those_of_the_singular_vectors(shape):
    weight, gradient = random_layer(*shape)
    form = full_form(*shape)
    L = torch.linalg.cholesky(form.output.moment.matrix)
    R = torch.linalg.cholesky(form.input.moment.matrix)
    U, sigma, Vh = torch.linalg.svd(L.T @ weight @ R, full_matrices=False)
    inner = torch.linalg.solve(L, gradient) @ torch.linalg.inv(R).T
    expected = -sigma * (U * (inner @ Vh.T)).sum(0)
    found = first_order_terms(decompose(weight, form, dtype=torch.float64), gradient)
    assert torch.allclose(found, expected, rtol=1e-8)


def test_first_order_terms_add_up_to_the_change_along_the_gradient():
    weight, gradient = random_layer(5, 7)
    spectrum = decompose(weight, full_form(5, 7), dtype=torch.float64)
    terms = first_order_terms(spectrum, gradient)
    for rank in range(5):
        error = spectrum.left[:, :rank] @ spectrum.right[:rank] - weight
        assert float(terms[rank:].sum()) == pytest.approx(float((gradient * error).sum()))


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_trusted_tails_stay_within_their_share_of_the_prices(trust):
    price = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    linear = torch.tensor([0.1, -9.0, 0.2, -0.1], dtype=torch.float64)
    tails = trusted_tails(price, linear, trust)
    second = torch.tensor([7.5, 3.5, 1.5, 0.5, 0.0], dtype=torch.float64)
    first = torch.tensor([-8.8, -8.9, 0.1, -0.1, 0.0], dtype=torch.float64)
    assert (tails >= (1 - trust) * second - 1e-12).all()
    assert (tails <= (1 + trust) * second + 1e-12).all()
    free = first.abs() <= trust * second
    assert torch.allclose(tails[free], (second + first)[free])


def test_plans_on_signed_tails_are_the_best_on_their_hull():
    """Brute force over all ranks of two small layers, at every size that a hull corner has."""
    shapes = {"a": (6, 6), "b": (8, 8)}
    tails = {
        "a": torch.tensor([5.0, 2.0, -0.5, 0.0, 0.0, 0.0, 0.0]),
        "b": torch.tensor([9.0, 1.0, 0.5, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]),
    }
    scores = {name: torch.linspace(1, 0.1, min(shape)) for name, shape in shapes.items()}

    def predicted(ranks):
        return sum(0.0 if r is None else float(tails[n][r]) for n, r in ranks.items())

    plans = [
        RankPlan({"a": a, "b": b}, shapes)
        for a, b in itertools.product([1, 2, None], [1, 2, 3, None])
    ]
    for wanted in ({"a": 1, "b": 1}, {"a": 2, "b": 1}):
        ratio = RankPlan(wanted, shapes).param_ratio
        found = plan_for_scores(shapes, scores, ratio, tails=tails)
        best = min(predicted(p.ranks) for p in plans if p.param_ratio <= ratio)
        assert predicted(found.ranks) == pytest.approx(best)


def test_a_correction_removes_the_part_of_the_error_along_the_gradient():
    weight, gradient = random_layer(6, 6, seed=4)
    spectrum = decompose(weight, QuadraticForm(), dtype=torch.float64)
    error = spectrum.left[:, :3] @ spectrum.right[:3] - weight
    gradient = gradient * torch.sign((gradient * error).sum())  # the error raises the loss
    moved = corrected_spectrum(weight, spectrum, 3, gradient, QuadraticForm(), 100.0)
    along, size = (gradient * error).sum(), gradient.square().sum()
    target = weight + error - along / size * gradient
    expected = decompose(target, QuadraticForm(), dtype=torch.float64)
    assert moved.left.shape == (6, 3)
    assert torch.allclose(moved.left @ moved.right, expected.left[:, :3] @ expected.right[:3])
    after = (gradient * (moved.left @ moved.right - weight)).sum()
    assert abs(float(after)) < abs(float(along))
    assert corrected_spectrum(weight, spectrum, 3, -gradient, QuadraticForm(), 1.0) is None


@pytest.mark.parametrize("largest", [1e-3, 1e-2])
def test_a_correction_stays_within_its_trust_region(largest):
    weight, gradient = random_layer(6, 6, seed=4)
    spectrum = decompose(weight, QuadraticForm(), dtype=torch.float64)
    truncated = spectrum.left[:, :3] @ spectrum.right[:3]
    gradient = gradient * torch.sign((gradient * (truncated - weight)).sum())
    moved = corrected_spectrum(weight, spectrum, 3, gradient, QuadraticForm(), largest)
    step = float((moved.left @ moved.right - truncated).norm() / weight.norm())
    assert largest / 10 < step <= 1.5 * largest


def test_only_sides_that_hold_for_any_weight_are_used_again():
    full = SecondMoment(torch.eye(3), 3.0, 3)
    images = SecondMoment(torch.eye(3), 5.0, 5)
    kept = retruncation_form(QuadraticForm(Side(moment=images), Side(moment=full)))
    assert kept == QuadraticForm(Side(), Side(moment=full))


# The data


def test_disjoint_sets_pass(text):
    check_disjoint(gradient=text[:4], acceptance=text[4:8], reported=None)


def test_an_item_in_two_sets_is_refused(text):
    shared = {name: tensor[2:] for name, tensor in text[1].items()}
    message = "^Item 4 of the reported set also stands in the gradient set; the gradient, acc"
    with pytest.raises(DataError, match=message):
        check_disjoint(gradient=text[:4], acceptance=text[4:8], reported=[text[9], shared])


def test_overlapping_windows_of_a_text_are_refused():
    tokens = torch.randint(3, 90, (1, 300), generator=torch.Generator().manual_seed(0))
    first, apart = {"input_ids": tokens[:, :128]}, {"input_ids": tokens[:, 128:256]}
    check_disjoint(gradient=[first], acceptance=[apart])
    with pytest.raises(DataError, match="must not overlap"):
        check_disjoint(gradient=[first], acceptance=[{"input_ids": tokens[:, 60:188]}])


def test_padding_and_labels_do_not_hide_the_same_sentence():
    one = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([0])}
    other = {
        "input_ids": torch.tensor([[0, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1]]),
        "labels": torch.tensor([1]),
    }
    with pytest.raises(DataError, match="must not overlap"):
        check_disjoint(gradient=[one], acceptance=[other])


def test_the_same_image_is_refused():
    images = torch.rand(4, 3, 2, 2)
    batch = {"images": images, "labels": torch.arange(4)}
    other = {"images": images[3:], "labels": torch.tensor([0])}
    check_disjoint(gradient=[batch], acceptance=[{"images": images + 1}])
    with pytest.raises(DataError, match="Item 0 of the acceptance set"):
        check_disjoint(gradient=[batch], acceptance=[other])


def test_overlap_is_refused_before_anything_else(text):
    model = tiny_llama()
    for sets in ((text[:2], text[1:3]), (text[:2], text[2:4], text[3:5])):
        with pytest.raises(DataError, match="must not overlap"):
            compress_jointly(model, LowRankConfig(param_ratio=0.6), *sets)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "plain", "param_ratio": 0.5}, "metric 'kfac' and rule 'price' only"),
        ({"rule": "energy", "param_ratio": 0.5}, "metric 'kfac' and rule 'price' only"),
        ({"rank": 3}, "set param_ratio or loss_tolerance"),
    ],
)
def test_other_goals_are_refused(text, settings, message):
    with pytest.raises(ConfigError, match=message):
        compress_jointly(tiny_llama(), LowRankConfig(**settings), text[:1], text[1:2])


def test_an_empty_set_is_refused(text):
    with pytest.raises(DataError, match="needs batches for the gradient and for acceptance"):
        compress_jointly(tiny_llama(), LowRankConfig(param_ratio=0.5), text[:1], [])


# The system


def test_a_given_size_is_kept_and_never_worse_than_price_alone(text):
    model = tiny_llama()
    result = compress_jointly(
        model, LowRankConfig(param_ratio=0.6), text[:6], text[6:9], text[9:], progress=False
    )
    report = result.report
    assert report.parameters["targeted_kept"] <= 0.6 * report.parameters["targeted_dense"]
    assert report.held_out["mean"] <= result.baseline.mean
    measured = [trial["mean"] for trial in result.trials if trial["complete"]]
    assert report.held_out["mean"] == min(measured)
    assert result.trials[0]["name"] == "price"
    assert len(result.trials) >= 3
    dense = measure_loss(tiny_llama(), text[6:9]).mean
    rise = measure_loss(model, text[6:9]).mean - dense
    assert rise == pytest.approx(report.held_out["mean"], abs=1e-5)
    reported = measure_loss(model, text[9:]).mean - measure_loss(tiny_llama(), text[9:]).mean
    assert report.evaluation.loss_difference == pytest.approx(reported, abs=1e-5)
    assert model.config.quantization_config.ranks == report.ranks
    assert report.to_dict()["joint"]["method"] == result.method
    assert f"joint: accepted {result.method!r} at" in format_report(report)


def test_nothing_tried_is_price_alone(text):
    config = LowRankConfig(param_ratio=0.6)
    result = compress_jointly(
        tiny_llama(), config, text[:4], text[4:6], settings=JointSettings((), ()), progress=False
    )
    assert result.method == "price"
    assert result.report.held_out["mean"] == result.baseline.mean
    assert len(result.trials) == 1


def test_candidates_without_a_finite_loss_are_refused(text, monkeypatch):
    measure, calls = HeldOutLoss.difference, []

    def fail_later(self, *args):
        calls.append(args)
        if len(calls) > 1:
            raise NumericalError("NaN")
        return measure(self, *args)

    monkeypatch.setattr(HeldOutLoss, "difference", fail_later)
    config = LowRankConfig(param_ratio=0.6)
    result = compress_jointly(tiny_llama(), config, text[:4], text[4:6], progress=False)
    assert result.method == "price"
    assert len(calls) >= 3


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_a_tolerance_is_kept_by_a_model_no_larger_than_price_alone(text, tolerance):
    model = tiny_llama()
    config = LowRankConfig(loss_tolerance=tolerance)
    result = compress_jointly(model, config, text[:6], text[6:9], text[9:], progress=False)
    parameters = result.report.parameters
    assert result.report.held_out["mean"] <= tolerance
    assert parameters["targeted_kept"] / parameters["targeted_dense"] <= result.baseline_ratio
    rise = measure_loss(model, text[6:9]).mean - measure_loss(tiny_llama(), text[6:9]).mean
    assert rise <= tolerance + 1e-5


def test_ranks_fixed_by_hand_stay(text):
    config = LowRankConfig(param_ratio=0.7, rank_pattern={"layers.0.self_attn.q_proj": 3})
    result = compress_jointly(tiny_llama(), config, text[:4], text[4:6], progress=False)
    assert result.report.ranks["model.layers.0.self_attn.q_proj"] == 3


def test_an_encoder():
    batches = sentence_batches(6)
    model = tiny_bert_classifier()
    result = compress_jointly(
        model,
        LowRankConfig(param_ratio=0.5),
        batches[:2],
        batches[2:4],
        batches[4:],
        progress=False,
    )
    assert result.report.held_out["mean"] <= result.baseline.mean
    assert any(isinstance(module, LowRankLinear) for module in model.modules())


class Vision(nn.Module):
    """Two convolutions, one of them 1x1, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 32, 1, bias=False)
        self.third = nn.Conv2d(32, 24, (3, 2), dilation=(1, 2), padding=(0, 1))
        self.hidden = nn.Linear(24, 16)
        self.classify = nn.Linear(16, 5)

    def forward(self, images):
        maps = self.third(self.second(self.first(images).tanh()).tanh()).tanh()
        return self.classify(self.hidden(maps.mean(dim=(2, 3))).tanh())


def vision_loss(model, batch):
    logits = model(batch["images"])
    losses = F.cross_entropy(logits, batch["labels"], reduction="none")
    return ItemLosses(losses, torch.ones_like(batch["labels"]))


def vision_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Vision().eval()


def vision_batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "images": torch.randn(8, 3, 8, 8, generator=generator),
            "labels": torch.randint(0, 5, (8,), generator=generator),
        }
        for _ in range(count)
    ]


def test_a_vision_model_of_linear_layers_and_convolutions():
    model, batches = vision_model(), vision_batches(6)
    names = linearize_convolutions_(model)
    assert names == ["first.linear", "second.linear", "third.linear"]
    config = LowRankConfig(param_ratio=0.6, target_modules=[*names, "hidden"])
    result = compress_jointly(
        model,
        config,
        batches[:3],
        batches[3:5],
        batches[5:],
        loss_function=vision_loss,
        progress=False,
    )
    assert result.report.held_out["mean"] <= result.baseline.mean
    assert result.report.parameters["targeted_kept"] < result.report.parameters["targeted_dense"]
    assert any(isinstance(module, LowRankLinear) for module in model.modules())


def test_a_linearized_convolution_computes_the_same():
    model, batch = vision_model(), vision_batches(1)[0]
    before = model(batch["images"])
    linearize_convolutions_(model)
    assert isinstance(model.third, LinearConv2d)
    assert torch.allclose(model(batch["images"]), before, atol=1e-5)


def test_convolutions_that_cannot_be_linearized_are_left_alone():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same"))
    with pytest.raises(TargetError, match="no convolution that can become linear"):
        linearize_convolutions_(model)


# The perturbation range


def test_predictions_hold_for_small_noise_and_fail_for_large(text):
    model = tiny_llama()
    config = LowRankConfig()
    targets = find_targets(model, config)
    gradients, moments = mean_gradients(model, targets, text[:4])
    spectra, _ = decompose_layers(targets, moments, config, progress=False)
    shapes = {name: spectrum.shape for name, spectrum in spectra.items()}
    plan = plan_for_budget(shapes, spectra, "price", 0.4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    points = measure_range(model, spectra, plan, gradients, text[:4], scales=(1.0, 1e-3, 1e-2, 0.1))
    assert [point.scale for point in points] == [1e-3, 1e-2, 0.1, 1.0]
    assert points[0].measured == pytest.approx(points[0].first_order, rel=0.2)
    assert abs(points[-1].measured - points[-1].first_order) > 0.5 * abs(points[-1].first_order)
    assert points[0].noise == pytest.approx(points[-1].noise / 1000)
    assert points[0].noise <= linear_range(points) < points[-1].noise
    assert linear_range(points, tolerance=0.0) == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(format_range(points).splitlines()) == 6


def test_gradients_are_those_of_the_mean_loss():
    model, batches = tiny_llama(), token_batches(3)
    targets = find_targets(model, LowRankConfig())
    found, _ = mean_gradients(model, targets, batches)
    total, count = 0.0, 0
    for batch in batches:
        logits = model(**batch).logits[:, :-1]
        total = total + F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="sum")
        count += batch["input_ids"][:, 1:].numel()
    (total / count).backward()
    for name, layer in targets.items():
        assert torch.allclose(found[name], layer.weight.grad, atol=1e-5), name


# The command


@pytest.mark.parametrize("goal", [{"param_ratio": 0.6}, {"loss_tolerance": 0}])
def test_the_command_saves_what_it_measured(tmp_path, monkeypatch, capsys, goal):
    inputs = make_inputs(tmp_path)
    run = InProcess("compress_llm", monkeypatch, capsys)
    output = tmp_path / "output"
    finished = run(*inputs.arguments(output_dir=output, **goal), "--joint")
    assert finished.code == 0, finished.err
    report = json.loads((output / "report.json").read_text())
    assert report["held_out"]["mean"] <= goal.get("loss_tolerance", math.inf)
    model = hf_lowrank.load(output)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == (report["parameters"]["kept"])
    )


def test_the_command_takes_one_size(tmp_path, monkeypatch, capsys):
    inputs = make_inputs(tmp_path)
    run = InProcess("compress_llm", monkeypatch, capsys)
    error = run(*inputs.arguments(), "--param_ratio", "0.6", "0.5", "--joint").error
    assert error == "joint works on one param_ratio at a time."

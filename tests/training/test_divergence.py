"""How far two predictions are apart, by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowrank.errors import ConfigError
from hf_lowrank.training.divergence import divergence


def output(*values: Any, **others: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"logits": torch.tensor(values)} | others))


def fake_model(**config: Any) -> nn.Module:
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(**config)
    return model


def test_classes_are_compared_by_kl_both_ways():
    one, two = output([0.0, 1.0], [2.0, -1.0]), output([1.0, 1.0], [0.0, 0.5])
    inputs = {"labels": torch.tensor([0, 1])}
    p, q = one.logits.softmax(-1), two.logits.softmax(-1)
    forth = (p * (p / q).log()).sum(-1).mean()
    back = (q * (q / p).log()).sum(-1).mean()
    model = fake_model()
    torch.testing.assert_close(divergence(model, inputs, one, two), forth)
    torch.testing.assert_close(divergence(model, inputs, one, two, symmetric=True),
                               (forth + back) / 2)  # fmt: skip


def test_numbers_are_compared_by_their_squared_difference():
    inputs = {"labels": torch.tensor([0.5, 1.0])}
    found = divergence(fake_model(), inputs, output([1.0], [2.0]), output([2.0], [5.0]))
    assert float(found) == pytest.approx(5.0)


def test_several_labels_are_compared_each_for_itself():
    inputs = {"labels": torch.tensor([[0.0, 1.0]])}
    p, q = torch.tensor([0.5, -1.0]).sigmoid(), torch.tensor([1.5, 2.0]).sigmoid()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    found = divergence(fake_model(), inputs, output([0.5, -1.0]), output([1.5, 2.0]))
    torch.testing.assert_close(found, wanted)


def test_spans_are_the_mean_of_start_and_end():
    start, end = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    one, two = (SimpleNamespace(start_logits=start[i], end_logits=end[i]) for i in (0, 1))
    parts = [
        divergence(fake_model(), {}, output(logits=x[0]), output(logits=x[1])) for x in (start, end)
    ]
    torch.testing.assert_close(divergence(fake_model(), {}, one, two), sum(parts) / 2)


def test_unlabelled_tokens_do_not_count():
    one, two = torch.randn(2, 1, 4, 3)
    inputs = {"labels": torch.tensor([[1, -100, 2, -100]])}
    found = divergence(fake_model(), inputs, output(logits=one), output(logits=two))
    wanted = divergence(fake_model(), {}, output(logits=one[0, ::2]), output(logits=two[0, ::2]))
    torch.testing.assert_close(found, wanted)


def test_outputs_without_logits_are_refused():
    with pytest.raises(ConfigError, match="returns no logits"):
        divergence(fake_model(), {}, SimpleNamespace(), SimpleNamespace())


def test_a_temperature_divides_the_logits_and_multiplies_by_its_square():
    one, two = output([0.0, 1.0], [2.0, -1.0]), output([1.0, 1.0], [0.0, 0.5])
    inputs = {"labels": torch.tensor([0, 1])}
    softer = [output(*(x.logits / 3).tolist()) for x in (one, two)]
    for both_ways in (False, True):
        found = divergence(fake_model(), inputs, one, two, temperature=3.0, symmetric=both_ways)
        wanted = 9 * divergence(fake_model(), inputs, *softer, symmetric=both_ways)
        torch.testing.assert_close(found, wanted)
    spans = [SimpleNamespace(start_logits=x.logits, end_logits=x.logits) for x in (one, two)]
    found = divergence(fake_model(), {}, *spans, temperature=3.0)
    torch.testing.assert_close(found, 9 * divergence(fake_model(), inputs, *softer))


def test_numbers_have_no_temperature():
    inputs = {"labels": torch.tensor([0.5, 1.0])}
    pair = output([1.0], [2.0]), output([2.0], [5.0])
    assert float(divergence(fake_model(), inputs, *pair, temperature=3.0)) == pytest.approx(5.0)

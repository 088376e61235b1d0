"""`get_lowrank_model`, and a module from outside transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankLinear, compress, get_lowrank_model
from hf_lowrank.measuring.items import ItemLosses
from tests.compression import is_dense
from tests.tiny_models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.oldest


def test_get_lowrank_model_returns_the_same_model_ready_to_train(text):
    model = tiny_llama().train()
    config = LowRankConfig(param_ratio=0.6)
    assert get_lowrank_model(model, config, text[:2], progress=False) is model
    assert not is_dense(model)
    assert model.training
    model(**text[0], labels=text[0]["input_ids"]).loss.backward()
    factors = [p for n, p in model.named_parameters() if "lowrank_" in n]
    assert factors
    assert all(parameter.grad.abs().sum() > 0 for parameter in factors)


def test_get_lowrank_model_without_data():
    model = get_lowrank_model(tiny_gpt2(), LowRankConfig(rank=3, metric="plain"), progress=False)
    ranks = {m.rank for m in model.modules() if isinstance(m, LowRankLinear)}
    assert ranks == {3}


def test_a_module_from_outside_transformers_is_compressed_with_its_own_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Linear(24, 5))
    inputs = torch.randn(8, 16, 24)
    batches = [{"x": x, "y": torch.randint(0, 5, (16,))} for x in inputs]

    def loss_function(model, batch):
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return ItemLosses(losses, torch.ones_like(batch["y"]))

    report = compress(
        model,
        LowRankConfig(param_ratio=0.5),
        batches[:6],
        batches[6:],
        loss_function=loss_function,
        progress=False,
    )
    assert set(report.ranks) == {"0", "2"}
    assert isinstance(model[0], LowRankLinear)
    assert isinstance(model[3], nn.Linear)
    assert report.parameters.targeted_kept <= 0.5 * 2 * 24 * 32
    assert report.evaluation.tokens == 32
    assert hf_lowrank.merge(model) is model
    assert is_dense(model)

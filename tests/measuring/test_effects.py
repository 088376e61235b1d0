"""What cuts do to the loss, from one backward pass, against what they are by definition."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.measuring.distributed import Processes
from hf_lowrank.measuring.effects import Cut, measure_effects
from hf_lowrank.measuring.items import ItemLosses
from hf_lowrank.measuring.losses import item_losses
from tests.tiny_models import (
    logits,
    sentence_batches,
    snapshot,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    token_batches,
)

DATA = partial(item_losses, label_source="data")
LAYER = "model.layers.0.mlp.up_proj"


def halves(model: nn.Module, name: str, scale: float = 1.0, seed: int = 0) -> Cut:
    """A weight as a sum of 8 components, drawn at random but for the last, which fills it up."""
    weight = linear_weight(model.get_submodule(name)).detach()
    generator = torch.Generator().manual_seed(seed)
    left = scale * torch.randn(weight.shape[0], 8, generator=generator)
    right = torch.randn(8, weight.shape[1], generator=generator)
    return Cut(name, left, right, [0, 3, 8])


def by_definition(model, cut, batch, step):
    """`<dL/dW, W_dropped>` with the gradient of each item's summed loss."""
    weight = model.get_submodule(cut.layer).weight
    dropped = cut.left[:, cut.counts[step] :] @ cut.right[cut.counts[step] :]
    if weight.shape != dropped.shape:
        dropped = dropped.T
    losses = DATA(model, batch).sums
    found = []
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        found.append(float((gradient * dropped).sum()))
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (tiny_llama, LAYER),
        (tiny_llama, "model.layers.1.self_attn.k_proj"),
        (tiny_gpt2, "transformer.h.0.attn.c_attn"),
    ],
)
def test_the_effect_is_the_change_of_the_loss_to_first_order(build, layer):
    model = build()
    batches = token_batches(2, batch_size=4, padding=3)
    cut = halves(model, layer)
    before = snapshot(model)
    found, scored = measure_effects(
        model, {layer: model.get_submodule(layer)}, {"c": cut}, batches, loss_function=DATA
    )
    assert scored == sum(int(DATA(model, batch).counts.sum()) for batch in batches)
    for step in range(3):
        expected = torch.cat([by_definition(model, cut, batch, step) for batch in batches])
        assert torch.allclose(found["c"].items[:, step], expected, rtol=1e-3, atol=1e-4)
    assert not found["c"].items[:, 2].abs().any()  # nothing is dropped there
    assert all(torch.equal(snapshot(model)[name], each) for name, each in before.items())
    assert not model.get_submodule(layer)._forward_hooks


def test_squares_are_summed_over_positions():
    model = tiny_llama()
    (batch,) = token_batches(1, batch_size=3)
    layer, kept = model.get_submodule(LAYER), {}

    def keep(module, args, output):
        if output.requires_grad:  # not in the probe of the head
            kept["inputs"] = args[0].detach()
            output.register_hook(lambda gradient: kept.update(gradient=gradient))

    handle = layer.register_forward_hook(keep)
    DATA(model, batch).sums.sum().backward()
    handle.remove()
    cut = halves(model, LAYER)
    effects, _ = measure_effects(model, {LAYER: layer}, {"c": cut}, [batch], loss_function=DATA)
    dropped = cut.left[:, 3:] @ cut.right[3:]
    each = torch.einsum("btm,mn,btn->bt", kept["gradient"], dropped, kept["inputs"])
    assert torch.allclose(effects["c"].squares[:, 1], each.square().sum(dim=1), rtol=1e-4)
    assert torch.allclose(effects["c"].items[:, 1], each.sum(dim=1), rtol=1e-4, atol=1e-5)


def test_over_the_draws_it_predicts_the_divergence_of_a_small_cut():
    model = tiny_llama()
    (batch,) = token_batches(1, batch_size=4)
    cut = halves(model, LAYER, scale=2e-3)
    layer = model.get_submodule(LAYER)
    effects, scored = measure_effects(model, {LAYER: layer}, {"c": cut}, [batch], draws=600)
    predicted = float(effects["c"].items[:, 0].square().sum()) / (2 * scored)
    old = logits(model, batch)[:, :-1].log_softmax(-1)
    with torch.no_grad():
        layer.weight.sub_(cut.left @ cut.right)
    new = logits(model, batch)[:, :-1].log_softmax(-1)
    measured = F.kl_div(new, old, log_target=True, reduction="none").sum(-1).mean()
    assert predicted == pytest.approx(float(measured), rel=0.15)


def test_labels_are_drawn_anew_and_repeatably():
    model, batches = tiny_llama(), token_batches(2, batch_size=2)
    arguments = (model, {LAYER: model.get_submodule(LAYER)}, {"c": halves(model, LAYER)}, batches)
    state = torch.get_rng_state()
    first, scored = measure_effects(*arguments, draws=2, seed=5)
    again, _ = measure_effects(*arguments, draws=2, seed=5)
    other, _ = measure_effects(*arguments, draws=2, seed=6)
    assert torch.equal(first["c"].items, again["c"].items)
    assert not torch.equal(first["c"].items, other["c"].items)
    assert not torch.equal(first["c"].items[:4], first["c"].items[4:])
    assert first["c"].items.shape == (8, 3)
    assert scored == 2 * sum(batch["input_ids"][:, 1:].numel() for batch in batches)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_encoder_with_a_head_is_measured_by_sentence():
    model = tiny_bert_classifier()
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in sentence_batches(2)]
    name = "bert.encoder.layer.0.intermediate.dense"
    found, scored = measure_effects(
        model, {name: model.get_submodule(name)}, {"c": halves(model, name)}, batches
    )
    assert scored == sum(len(batch["input_ids"]) for batch in batches) == len(found["c"].items)
    assert bool((found["c"].items[:, 0] != 0).all())


def test_a_layer_that_is_called_twice_adds_both_calls_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return self.inner(torch.tanh(self.inner(x)))

    def loss(model, batch):
        return ItemLosses(
            model(batch["x"]).square().sum(dim=(1, 2)), torch.ones(2, dtype=torch.long)
        )

    model, batch = Twice(), {"x": torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))}
    cut = halves(model, "inner")
    found, _ = measure_effects(
        model, {"inner": model.inner}, {"c": cut}, [batch], loss_function=loss
    )
    expected = []
    for each in loss(model, batch).sums:
        (gradient,) = torch.autograd.grad(each, model.inner.weight, retain_graph=True)
        expected.append(float((gradient * (cut.left @ cut.right)).sum()))
    assert torch.allclose(found["c"].items[:, 0], torch.tensor(expected), rtol=1e-4)


def test_processes_share_the_batches(monkeypatch):
    model, batches = tiny_llama(), token_batches(4, batch_size=2)
    arguments = (model, {LAYER: model.get_submodule(LAYER)}, {"c": halves(model, LAYER)}, batches)
    whole, scored = measure_effects(*arguments)
    parts: list[dict] = []
    monkeypatch.setattr(Processes, "merge", lambda self, part: parts.append(dict(part)) or part)
    for index in range(2):
        measure_effects(*arguments, processes=Processes(index, 2))
    losses, found = parts[0] | parts[2], parts[1] | parts[3]
    assert sum(losses.values()) == scored
    together = torch.cat([found[place]["c"].items for place in sorted(found)])
    assert torch.equal(together, whole["c"].items)

"""Which layers qualify, by kind; and that asking leaves no trace."""

import re

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from hf_lowrank import LowRankConfig
from hf_lowrank.errors import TargetError
from hf_lowrank.measuring.items import ItemLosses
from hf_lowrank.modeling.qualification import qualified
from hf_lowrank.modeling.targets import fixed_ranks
from tests.tiny_models import batches_for, equal_states, snapshot, tiny_llama

BATCH = {"inputs": torch.arange(48.0).view(2, 3, 8) / 48}
READ = "other code than the layer's own reads its weight"


class Net(nn.Module):
    """Two plain layers in blocks, and one more to be made odd; `use` says how that is called."""

    def __init__(self, odd=None, use=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), odd or nn.Linear(8, 8)])
        self.register_buffer("calls", torch.zeros(1))
        self.use = use or (lambda layer, hidden: layer(hidden))

    def forward(self, inputs):
        self.calls += 1
        hidden = self.layers[0](inputs)
        return self.layers[1](hidden) + self.use(self.layers[2], hidden)


def squares(model, batch):
    output = model(**batch)
    return ItemLosses(output.square().flatten(1).sum(1), torch.ones(len(output)))


def reason(net, batch=BATCH, **options):
    """Reason of layer 2, while the others qualify."""
    found = qualified(net, LowRankConfig(), batch, loss_function=squares, **options)
    assert list(found.targets) == [f"layers.{index}" for index in range(3 - len(found.left_dense))]
    assert set(found.left_dense) <= {"layers.2"}
    return found.left_dense.get("layers.2")


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 4 * super().forward(inputs)


def hooked(layer):
    layer.register_forward_pre_hook(lambda *call: None)
    return layer


def patched(layer):
    layer.forward = lambda inputs: 2 * F.linear(inputs, layer.weight)
    return layer


def with_buffer(layer):
    layer.register_buffer("scale", torch.ones(1))
    return layer


def integers(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return layer


def flattened(layer):
    layer.weight = nn.Parameter(torch.empty(0))
    return layer


LINEAR = nn.Linear(8, 8)
VISIBLE = {
    "subclass": (Scaled(8, 8), "it is a Scaled, which no pass showed to compute as nn.Linear"),
    "parametrized": (
        parametrizations.weight_norm(nn.Linear(8, 8)),
        "it holds more than a weight and a bias: parametrizations",
    ),
    "pruned": (
        prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5),
        "it holds more than a weight and a bias: weight_mask, weight_orig",
    ),
    "buffer": (with_buffer(nn.Linear(8, 8)), "it holds more than a weight and a bias: scale"),
    "hook": (hooked(nn.Linear(8, 8)), "it has hooks, which would be lost"),
    "patched": (
        patched(nn.Linear(8, 8)),
        "its forward method was replaced, which would be lost",
    ),
    "offloading": (
        add_hook_to_module(nn.Linear(8, 8), AlignDevicesHook("cpu", offload=True)),
        "its weight is on the meta device, offloaded or never loaded",
    ),
    "meta": (
        nn.Linear(8, 8, device="meta"),
        "its weight is on the meta device, offloaded or never loaded",
    ),
    "integers": (
        integers(nn.Linear(8, 8)),
        "its weight is a Parameter of torch.int8, not of floats",
    ),
    "flattened": (flattened(nn.Linear(8, 8)), "its weight has shape (0,), not (8, 8)"),
}


@pytest.mark.parametrize("kind", VISIBLE)
def test_what_a_replacement_would_lose_stays_dense(kind):
    layer, wanted = VISIBLE[kind]
    assert reason(Net(layer), batch=None) == wanted


class Product(nn.Linear):
    """Computes what its parent does, by a function of its own, as Falcon's layer does."""

    def forward(self, inputs):
        return inputs @ self.weight.T + self.bias


@pytest.mark.parametrize("layer", [nn.Linear(8, 8, bias=False), Conv1D(8, 8), Product(8, 8)])
def test_plain_layers_qualify(layer):
    assert reason(Net(layer), needs_gradient=True) is None


def test_a_subclass_that_computes_something_else_stays_dense():
    assert reason(Net(Scaled(8, 8))) == "it is a Scaled and computes something else than nn.Linear"


def test_two_layers_that_share_a_weight_stay_dense_and_name_each_other():
    net = Net()
    net.layers[2].weight = net.layers[1].weight
    found = qualified(net, LowRankConfig(), BATCH, loss_function=squares)
    assert found.left_dense == {
        "layers.1": "it shares its parameters with layers.2",
        "layers.2": "it shares its parameters with layers.1",
    }


def test_weights_in_the_same_memory_are_shared_as_well():
    net = Net()
    net.layers[2].weight = nn.Parameter(net.layers[1].weight.data)
    assert list(qualified(net, LowRankConfig(), BATCH).targets) == ["layers.0"]


def test_a_layer_in_two_places_stays_dense():
    net = Net()
    net.tied = net.layers[2]
    assert reason(net) == "it shares its parameters with tied"


def test_a_weight_that_the_model_holds_itself_stays_dense():
    net = Net()
    net.kept = net.layers[2].weight
    assert reason(net) == "it shares its parameters with the model itself"


def test_a_block_under_two_names_is_one_block():
    net = Net()
    net.alias = net.layers
    assert reason(net) is None


USES = {
    "function": lambda layer, hidden: F.linear(hidden, layer.weight),
    "product": lambda layer, hidden: hidden @ layer.weight.T,
    "data": lambda layer, hidden: layer(hidden) + hidden @ layer.weight.data,
    "list": lambda layer, hidden: hidden @ torch.cat([layer.weight, layer.weight])[:8],
    "keyword": lambda layer, hidden: torch.matmul(hidden, other=layer.weight) + layer(hidden),
    "norm": lambda layer, hidden: layer(hidden) / layer.weight.norm(),
}


@pytest.mark.parametrize("use", USES)
def test_a_layer_whose_weight_others_read_stays_dense(use):
    assert reason(Net(use=USES[use])) == READ


def test_asking_for_the_form_of_a_weight_is_no_reading():
    def use(layer, hidden):
        assert layer.weight.shape[0] == layer.weight.size(0) == 8
        return layer(hidden.to(layer.weight.dtype).to(layer.weight.device))

    assert reason(Net(use=use)) is None


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (lambda layer, hidden: 0, "the first batch does not call it"),
        (lambda layer, hidden: layer(hidden[:0]).sum(), "the first batch does not call it"),
        (lambda layer, hidden: layer.forward(hidden), READ),  # unseen by any hook
        (lambda layer, hidden: layer(input=hidden), "it is called with keyword arguments"),
    ],
)
def test_a_layer_that_is_not_really_called_stays_dense(use, wanted):
    assert reason(Net(use=use)) == wanted


def without_gradient(layer, hidden):
    with torch.no_grad():
        return layer(hidden)


@pytest.mark.parametrize(
    "use",
    [
        without_gradient,
        lambda layer, hidden: layer(hidden).detach(),
        lambda layer, hidden: 0 * layer(hidden).argmax(),
    ],
)
def test_a_layer_without_a_gradient_stays_dense_where_one_is_needed(use):
    wanted = "no gradient of the first batch's loss reaches it"
    assert reason(Net(use=use), needs_gradient=True) == wanted
    assert reason(Net(use=use), needs_gradient=False) is None


def test_a_layer_qualifies_that_is_written_into():
    assert reason(Net(use=lambda layer, hidden: layer(hidden).mul_(2)), needs_gradient=True) is None


def test_made_up_tokens_show_what_is_read_but_not_what_is_called():
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda hidden: F.linear(mlp.up_proj(hidden), mlp.down_proj.weight)
    found = qualified(model, LowRankConfig())
    assert found.left_dense == {"model.layers.0.mlp.down_proj": READ}
    assert "model.layers.0.mlp.gate_proj" in found.targets


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(needs_gradient, fails):
    net = Net(use=(lambda layer, hidden: 1 / 0) if fails else None).train()
    net.layers[1].eval()
    net.layers[0].weight.requires_grad_(False)
    net.layers[2].weight.grad = torch.ones(8, 8)

    def state():
        return (
            [module.training for module in net.modules()],
            [parameter.requires_grad for parameter in net.parameters()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
            [p.grad is None for p in net.parameters()],
            torch.get_rng_state().tolist(),
        )

    before, weights, buffer = state(), snapshot(net), net.calls
    if fails:
        with pytest.raises(ZeroDivisionError):
            reason(net, needs_gradient=needs_gradient)
    else:
        assert reason(net, needs_gradient=needs_gradient) is None
    assert state() == before
    assert equal_states(snapshot(net), weights)
    assert net.calls is buffer
    assert torch.equal(net.layers[2].weight.grad, torch.ones(8, 8))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["layers.2", "layers.0"]},
        {"rank": 2, "rank_pattern": {"layers.2": 3}},
        {"ranks": {"layers.2": 3}, "metric": "plain"},
    ],
)
def test_a_layer_named_in_full_must_qualify(settings):
    message = "layers.2: can't be factorized, it is a Scaled and computes .*; leave it out.$"
    with pytest.raises(TargetError, match=message):
        qualified(Net(Scaled(8, 8)), LowRankConfig(**settings), BATCH)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["layers.*"]},
        {"rank_pattern": {"layers.2": None}},
        {"rank": 2, "rank_pattern": {"*.2": 3}},
    ],
)
def test_a_layer_that_a_pattern_means_may_stay_dense(settings):
    config = LowRankConfig(**settings)
    found = qualified(Net(Scaled(8, 8)), config, BATCH)
    assert list(found.targets) == ["layers.0", "layers.1"]
    assert list(found.left_dense) == ["layers.2"]
    assert fixed_ranks(found.targets, config) == {}


def test_where_no_layer_is_left_the_reason_is_named():
    message = (
        "No layer of Net that was asked for can be factorized; layers.2, for one: it is a Scaled "
        "and computes something else than nn.Linear. Name others with target_modules."
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        qualified(Net(Scaled(8, 8)), LowRankConfig(target_modules=["*.2"]), BATCH)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_an_adapter_is_refused(wrapped):
    model, settings = tiny_llama(), LoraConfig(target_modules=["q_proj"])
    if wrapped:
        model = get_peft_model(model, settings)
    else:
        model.add_adapter(settings)
    where = "PeftModel of peft" if wrapped else "Linear of peft at model.layers.0.self_attn.q_proj"
    message = (
        rf"^The model has an adapter \({where}\); merge it first \(merge_and_unload\), or start "
        "from the model without it and train the adapter after the compression.$"
    )
    with pytest.raises(TargetError, match=message):
        qualified(model, LowRankConfig(), batches_for(model)[0])


def test_a_merged_adapter_is_none():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).merge_and_unload()
    assert not qualified(model, LowRankConfig(), batches_for(model)[0]).left_dense


def test_accelerates_hooks_that_only_place_inputs_are_no_reason():
    model = dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    found = qualified(model, LowRankConfig(), batches_for(model)[0])
    assert hasattr(model.model.layers[0].mlp.up_proj, "_hf_hook")
    assert not found.left_dense


def test_a_compiled_model_is_watched_as_well():
    net = Net(use=USES["function"])
    compiled = torch.compile(net, backend="eager")
    assert "_orig_mod.layers.2" in qualified(compiled, LowRankConfig(), BATCH).left_dense

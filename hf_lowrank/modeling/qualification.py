"""Which of the named layers can be factorized: called, plain, unwrapped and on a real device.

A layer's class says little about how a model uses it. So everything that a replacement would lose
is looked for on the layer itself, and one pass over the first batch shows the rest. A layer that
does not qualify stays dense, with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import TargetError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.measuring.collection import frozen, prepared, run_batch
from hf_lowrank.measuring.distributed import ALONE, Processes
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.modeling.watching import Watch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Qualified(NamedTuple):
    """The layers to factorize by name, and the reason by name of those that stay dense."""

    targets: dict[str, nn.Module]
    left_dense: dict[str, str]


def qualified(
    model: nn.Module,
    config: LowRankConfig,
    batch: Batch | None = None,
    *,
    needs_gradient: bool = False,
    loss_function: LossFunction | None = None,
    processes: Processes = ALONE,
) -> Qualified:
    """The layers that the config asks for, less those that can't be factorized.

    The model is left as it was: weights, gradients, buffers, modes, hooks and the random state.

    Args:
        model: The dense model.
        config: Names the layers, see `find_targets`.
        batch: The first batch of the run. Without one, made-up tokens show whose weights are read,
            where the model takes such tokens; whether a layer is called remains open then.
        needs_gradient: Whether the metric reads gradients, so that one must reach each layer.
        loss_function: Loss of a batch; by default the model's own task loss.
        processes: Those that run this with the same model; the main one's answer counts.

    Raises:
        TargetError: No layer is left, or one that the config names in full does not qualify, or
            the model rescales its own weights.
        DataError, NumericalError: The batch has no loss, or none that is finite.
        ConfigError: See `find_targets`.
    """
    refuse_rescaling(model)
    named = find_targets(model, config)
    loss = loss_function
    if loss is None and needs_gradient:
        loss = partial(item_losses, label_source=config.label_source)
    reasons = reasons_against(model, named, batch, needs_gradient=needs_gradient, loss=loss)
    return without_unfit(model, config, named, processes.decide(reasons))


def without_unfit(
    model: nn.Module,
    config: LowRankConfig,
    named: Mapping[str, nn.Module],
    reasons: dict[str, str],
) -> Qualified:
    """The named layers less those that there are reasons against.

    Raises:
        TargetError: No layer is left, or one that the config names in full is not.
    """
    for name in _named_in_full(config):
        if name in reasons:
            raise TargetError(f"{name}: can't be factorized, {reasons[name]}; leave it out.")
    targets = {name: layer for name, layer in named.items() if name not in reasons}
    if not targets:
        name = next(iter(reasons))
        raise TargetError(
            f"No layer of {type(model).__name__} that was asked for can be factorized; {name}, for "
            f"one: {reasons[name]}. Name others with target_modules."
        )
    return Qualified(targets, reasons)


def reasons_against(
    model: nn.Module,
    named: Mapping[str, nn.Module],
    batch: Batch | None,
    *,
    needs_gradient: bool,
    loss: LossFunction | None,
) -> dict[str, str]:
    """The reason of each of these layers that can't be factorized, by name.

    Args:
        model: The dense model.
        named: Some of its layers.
        batch: See `qualified`.
        needs_gradient: Likewise.
        loss: Loss of a batch; without one the layers alone are run.

    Raises:
        DataError, NumericalError: See `qualified`.
    """
    reasons = _visible_reasons(model, named)
    plain = {name: layer for name, layer in named.items() if name not in reasons}
    watch = Watch(plain, needs_gradient=needs_gradient and batch is not None)
    if batch is not None:
        _watch_batch(model, watch, batch, loss)
        reasons |= watch.uncalled()
    else:
        _watch_made_up_tokens(model, watch)
    reasons |= watch.misused()
    return {name: reasons[name] for name in named if name in reasons}


def refuse_rescaling(model: nn.Module) -> None:
    """RWKV divides weights in its first pass, and divides what was saved after it once more.

    Raises:
        TargetError: The model does so.
    """
    every = getattr(getattr(model, "config", None), "rescale_every", 0)
    if every:
        raise TargetError(
            f"{type(model).__name__}: divides weights of its own in its first pass (rescale_every "
            f"{every}), and would do so again with the saved ones; set rescale_every to 0 in its "
            "config.json, or give it to from_pretrained."
        )


def _named_in_full(config: LowRankConfig) -> list[str]:
    """What the config may name without a pattern; a mere pattern is no such name."""
    ranks = {**config.rank_pattern, **(config.ranks or {})}
    wanted = [name for name, rank in ranks.items() if rank is not None]
    return [*(config.target_modules or []), *wanted, *(config.narrowed or {})]


def _visible_reasons(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Reasons that show without a pass."""
    holders = _holders(model)
    found = {}
    for name, layer in layers.items():
        reason = _odd_layer(layer) or _odd_weight(layer) or _sharing(layer, name, holders)
        if reason is not None:
            found[name] = reason
    return found


def _odd_layer(layer: nn.Module) -> str | None:
    if any(parameter.device.type == "meta" for parameter in layer.parameters()):
        return "its weight is on the meta device, offloaded or never loaded"
    kept = set(layer._parameters) - {"weight", "bias"} | set(layer._buffers) | set(layer._modules)
    if kept or "weight" not in layer._parameters:
        return f"it holds more than a weight and a bias: {', '.join(sorted(kept))}"
    if any(getattr(layer, hooks, None) for hooks in _HOOKS):
        return "it has hooks, which would be lost"
    return replaced_forward(layer)


def replaced_forward(layer: nn.Module) -> str | None:
    """A reason against a layer whose forward method is not its class's own."""
    hook = getattr(layer, "_hf_hook", None)
    # Accelerate's hooks on the blocks move inputs to a device as well; offloading ones do more.
    is_placed = isinstance(hook, AlignDevicesHook) and not hook.offload
    if "forward" in vars(layer) and not is_placed:
        return "its forward method was replaced, which would be lost"
    return None


def _odd_weight(layer: nn.Module) -> str | None:
    weight: Any = layer.weight
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not of floats"
    rows, columns = linear_shape(layer)
    if tuple(weight.shape) != ((columns, rows) if isinstance(layer, Conv1D) else (rows, columns)):
        return f"its weight has shape {tuple(weight.shape)}, not {(rows, columns)}"
    return None


def _sharing(layer: nn.Module, name: str, holders: Mapping[object, list[str]]) -> str | None:
    """Two places that hold the same layer or the same numbers would no longer do so."""
    keys = [id(layer), *(_identity(parameter) for parameter in layer.parameters())]
    others = [place for key in keys for place in holders[key] if place != name]
    return f"it shares its parameters with {others[0] or 'the model itself'}" if others else None


def _holders(model: nn.Module) -> dict[object, list[str]]:
    """Where each layer and each parameter is held; a block under two names counts once."""
    holders: dict[object, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(_identity(parameter), []).append(name)
        for key, child in module._modules.items():
            holders.setdefault(id(child), []).append(f"{name}.{key}" if name else key)
    return holders


def _identity(parameter: nn.Parameter) -> object:
    """The same for two parameters in the same memory."""
    if type(parameter) is nn.Parameter and parameter.device.type != "meta" and parameter.numel():
        return parameter.device, parameter.data_ptr()
    return id(parameter)


def _watch_batch(model: nn.Module, watch: Watch, batch: Batch, loss: LossFunction | None) -> None:
    """Watches a pass over a batch, with a backward pass where there is a loss."""
    with undisturbed(model):
        inputs = prepared(model, batch)
        with watch.installed():
            run_batch(model, inputs, loss, watch.needs_gradient)


def _watch_made_up_tokens(model: nn.Module, watch: Watch) -> None:
    """Watches a pass over a few tokens, as far as that pass comes."""
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, dict) or any(p.device.type == "meta" for p in model.parameters()):
        return
    device = next(model.parameters()).device
    # Models of images or sound do not take tokens; how they use their layers is then not known.
    with undisturbed(model), watch.installed(), torch.no_grad(), suppress(Exception):
        model(**{name: value.to(device) for name, value in inputs.items()})


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients of parameters; afterwards all is as before, buffers included."""
    held = [(module, dict(module._buffers)) for module in model.modules()]
    values = {id(b): b.clone() for _, buffers in held for b in buffers.values() if b is not None}
    try:
        with frozen(model), torch.random.fork_rng():
            yield
    finally:
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)
            for buffer in buffers.values():
                if buffer is not None and not buffer.is_meta:
                    buffer.detach().copy_(values[id(buffer)])

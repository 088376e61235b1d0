"""From last hidden states to logits, position by position, so that slices of positions will do.

Most models apply their head and nothing else. Others cap the logits, or scale them or the hidden
states; then the model's own forward pass is run from the hidden states on, whatever it does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from hf_lowrank.measuring.items import (
    Batch,
    device_of,
    eval_mode,
    inner_model,
    without_labels,
)

Projection = Callable[[torch.Tensor], torch.Tensor]
_INPUTS = ("input_ids", "inputs_embeds")
_HEAD_ALONE = "head alone"
# By model: _HEAD_ALONE, the type of the body's output, or None if there is no such projection.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def last_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What the layers below the head hand to it, shape (batch, length, hidden)."""
    body = inner_model(model).base_model
    hidden: torch.Tensor = body(**without_labels(batch), use_cache=False)[0]  # type: ignore[operator]
    return hidden


def projection(model: nn.Module, batch: Batch) -> Projection | None:
    """What makes logits of hidden states, shape (..., hidden); found out once for each model.

    None if that takes more than the head: another layer between, or a change that is not made at
    each position alone. Up to 4 tokens of the batch are read.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _find(model, batch)
    known = _KNOWN[model]
    if known is None:
        return None
    if known is _HEAD_ALONE:
        head: Projection = model.get_output_embeddings()  # type: ignore[operator]
        return head
    return partial(_forward_from, inner_model(model), known)


def probe_of(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The first 4 tokens of the first item, on the model's device."""
    device = device_of(model)
    return {name: batch[name][:1, :4].to(device) for name in _INPUTS if name in batch}


def plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward pass without what accelerate and torch.compile put around it.

    Mixed precision rounds the logits, compiled kernels do so differently.
    """
    found: Any = getattr(model, "_original_forward", getattr(model, "_orig_mod", model))
    return found  # type: ignore[no-any-return]


@torch.no_grad()
def _find(model: nn.Module, batch: Batch) -> Any:  # noqa: ANN401
    head, inner = model.get_output_embeddings(), inner_model(model)  # type: ignore[operator]
    body: Any = getattr(inner, "base_model", inner)
    if head is None or body is inner:
        return None
    probe = probe_of(model, batch)
    with eval_mode(model):
        expected = plain_forward(model)(**probe, use_cache=False).logits
        output = body(**probe, use_cache=False)
        if _makes(head, output[0], expected):
            return _HEAD_ALONE
        kind = type(output) if isinstance(output, ModelOutput) else tuple
        tail = partial(_forward_from, inner, kind)
        with _called_layers(inner) as called:
            same = _makes(tail, output[0], expected)
        if same and called <= set(head.modules()) and _by_position(tail, output[0], expected):
            return kind
    return None


def _forward_from(inner: nn.Module, kind: type, hidden: torch.Tensor) -> torch.Tensor:
    """The model's own forward pass with its body's output given."""
    states = hidden.reshape(1, -1, hidden.shape[-1])
    tokens = torch.zeros(states.shape[:2], dtype=torch.long, device=hidden.device)
    output = (states,) if kind is tuple else kind(last_hidden_state=states)
    body: Any = inner.base_model
    own = vars(body).get("forward")  # accelerate's hooks stand there
    body.forward = lambda *args, **inputs: output
    try:
        logits = type(inner).forward(inner, input_ids=tokens, use_cache=False).logits
    finally:
        del body.forward
        if own is not None:
            body.forward = own
    return logits.reshape(*hidden.shape[:-1], -1)  # type: ignore[no-any-return]


def _makes(project: Projection, hidden: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether it gives the logits bit for bit: a soft cap hardly shows in small ones."""
    try:
        found = project(hidden)
    except Exception:  # code that we have never seen, on inputs that it does not expect
        return False
    return torch.equal(found.float(), expected.float())


def _by_position(project: Projection, hidden: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 0.02 * float(expected.abs().max())  # kernels differ by shape
    return torch.allclose(project(hidden[:, :1]), expected[:, :1], rtol=0.0, atol=tolerance)


@contextmanager
def _called_layers(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Collects the modules with parameters of their own that are called inside the block."""
    called: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args: called.add(module))
        for module in model.modules()
        if module._parameters
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()

"""Which fused experts can be narrowed, and of which whole ones can be dropped.

Code that was never seen is believed only as far as it is seen to do what is expected: on the first
batch each layer is computed again, expert by expert, and has to come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.format.fused_experts import experts_shape, find_router
from hf_lowrank.measuring.collection import prepared, run_batch
from hf_lowrank.measuring.distributed import ALONE, Processes
from hf_lowrank.measuring.hooks import forward_hooks, watched
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.measuring.routing import Experts, Routed, route
from hf_lowrank.modeling.qualification import replaced_forward, undisturbed
from hf_lowrank.modeling.targets import match_name

_EPSILONS = 64  # rounding that two orders of summation may differ by
_TOKENS = 64  # that routers are tried on


class QualifiedExperts(NamedTuple):
    """Router (or None) by the name of each module of experts, and the reasons against others."""

    routers: dict[str, str | None]
    left_dense: dict[str, str]


def qualified_experts(
    model: nn.Module,
    config: LowRankConfig,
    batch: Batch | None,
    *,
    loss_function: LossFunction | None = None,
    processes: Processes = ALONE,
) -> QualifiedExperts:
    """The fused experts that the config asks for and that can be narrowed.

    Args:
        model: The dense model; it is left as it was.
        config: Which layers; without `channels` there are none.
        batch: The first of the run; without one there are none.
        loss_function: Loss of a batch; by default the model's own task loss.
        processes: Those that run this with the same model; the main one's answer counts.
    """
    named = {n: m for n, m in model.named_modules() if experts_shape(m) and _is_asked(n, config)}
    if not named or not config.channels or batch is None:
        return QualifiedExperts({}, {})
    reasons = {name: reason for name, each in named.items() if (reason := _odd(each))}
    trial = _Trial({name: Experts(m) for name, m in named.items() if name not in reasons})
    with undisturbed(model):
        inputs = prepared(model, batch)
        with trial.installed():
            default = partial(item_losses, label_source=config.label_source)
            run_batch(model, inputs, loss_function or default, True)
        reasons |= trial.reasons()
        routers = {
            name: _router(model, name, trial.seen[name]) for name in named if name not in reasons
        }
    return processes.decide(QualifiedExperts(routers, reasons))


def experts_of(model: nn.Module, routers: Mapping[str, str | None]) -> dict[str, Experts]:
    """The modules behind the names."""
    return {
        name: Experts(model.get_submodule(name), model.get_submodule(router) if router else None)
        for name, router in routers.items()
    }


def _is_asked(name: str, config: LowRankConfig) -> bool:
    wanted = config.target_modules is None or any(
        match_name(name, pattern) for pattern in config.target_modules
    )
    return wanted and not any(match_name(name, each) for each in config.exclude_modules or [])


def _odd(module: nn.Module) -> str | None:
    """A reason that shows without a pass."""
    flags: Any = vars(module)
    if any(p.device.type == "meta" or not p.is_floating_point() for p in module.parameters()):
        return "its weights are on the meta device, or no floats"
    if "is_concatenated" not in flags or flags.get("has_post_expert_norm"):
        return f"{type(module).__name__} does not say how it lays out its experts, or norms them"
    if any(True for child in module.children() for _ in child.parameters()):
        return f"{type(module).__name__} holds more than its experts' weights"
    return replaced_forward(module)


class _Trial:
    """Notes what each layer is given, and whether it gives what its experts do."""

    def __init__(self, layers: Mapping[str, Experts]) -> None:
        self.layers = layers
        self.seen: dict[str, Routed] = {}
        self.bad: dict[str, str] = {}
        self.reached: set[str] = set()

    def installed(self) -> AbstractContextManager[None]:
        """Watches for the time of the block."""
        return forward_hooks(
            {n: each.module for n, each in self.layers.items()}, self._on_forward, with_kwargs=True
        )

    def _on_forward(
        self,
        name: str,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> torch.Tensor | None:
        routed = Routed.of([*args, *kwargs.values()])
        if routed is None or not isinstance(output, torch.Tensor):
            self.bad[name] = "it is called with something else than tokens, experts and weights"
            return None
        self.seen[name] = routed
        with torch.no_grad():
            reason = _differs(self.layers[name], routed, output.reshape(routed.tokens.shape))
        if reason:
            self.bad[name] = reason
        result = watched(output)
        if result is not None:
            result.register_hook(lambda gradient: self.reached.add(name))
        return result

    def reasons(self) -> dict[str, str]:
        """Why layers can't be narrowed, by name."""
        unseen = {n: "the first batch does not call it" for n in self.layers if n not in self.seen}
        missed = {
            name: "no gradient of the first batch's loss reaches it"
            for name in self.seen
            if name not in self.reached
        }
        return unseen | missed | self.bad


def _differs(experts: Experts, routed: Routed, output: torch.Tensor) -> str | None:
    kind = type(experts.module).__name__
    tolerance = _EPSILONS * torch.finfo(output.dtype).eps
    found = experts.combined(routed)
    if not (found - output).float().norm() <= tolerance * output.float().norm():
        return f"{kind} computes something else than its experts one by one"
    width, module = experts.shape.size.width, experts.module
    rows = torch.randn(4, experts.shape.inputs, width, dtype=output.dtype, device=output.device)
    apart = bool(module.is_concatenated)
    parts = [(part if apart else part.swapdims(1, 2)).flatten(1) for part in (rows, rows[..., 1:])]
    act: Any = module._apply_gate if experts.shape.inputs == 2 else module.act_fn
    whole, fewer = map(act, parts)
    if not torch.allclose(whole[:, 1:], fewer, rtol=tolerance, atol=tolerance):
        return f"{kind}'s channels do not act one by one"
    return None


@torch.no_grad()
def _router(model: nn.Module, name: str, routed: Routed) -> str | None:
    """The router of a layer, if a smaller one is seen to choose as this one among fewer."""
    router, routed = find_router(model, name), routed[torch.arange(len(routed.tokens))[:_TOKENS]]
    if router is None:
        return None
    experts = Experts(model.get_submodule(name), model.get_submodule(router))
    assert experts.router is not None
    try:
        said, ids = route(experts.router, routed.tokens), experts.next_best(routed.tokens)
        if ids is None or not torch.equal(said.shares(ids), routed.shares(ids)):
            return None
        after = experts.without(int(ids[0, 0]), routed.tokens)
    except (RuntimeError, ValueError, TypeError, IndexError):  # code that we have never seen
        return None
    kept = (after.index[:, :, None] == ids[:, None, :]).any(dim=2).all()
    return router if bool(kept) else None

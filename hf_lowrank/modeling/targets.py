"""Which layers of a model are factorized, and what is left untouched.

Both `nn.Linear` and GPT-2's `Conv1D` (which stores its weight transposed) are seen through
`linear_weight`, always as (out_features, in_features).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError, TargetError, already_quantized
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.fused_experts import experts_shape, small_experts
from hf_lowrank.format.layout import QUANT_METHOD
from hf_lowrank.format.rebuild import compressed_layers
from hf_lowrank.ranks.plan import break_even_rank, useful_rank

Value = TypeVar("Value")

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate", "wg")


def find_targets(model: nn.Module, config: LowRankConfig) -> dict[str, nn.Module]:
    """The layers that the config asks for, by module name in the model's order.

    Without `target_modules` these are all linear layers inside the transformer blocks, that is
    below an `nn.ModuleList`; never embeddings, output heads or routers, nor layers too narrow to
    gain from any rank. A model without blocks offers all its linear layers but the last. Patterns
    may name fused experts, too; see `qualified_experts`.

    Raises:
        TargetError: The model is already compressed, has an adapter, a pattern matches nothing, or
            no layer is left.
        ConfigError: A rank of `rank_pattern` or `rank` exceeds its layer's limit.
    """
    if compressed_layers(model) or small_experts(model):
        raise TargetError(
            "The model is already compressed; merge it first (hf_lowrank.merge) or start from "
            "the dense checkpoint."
        )
    _refuse_adapter(model)
    quantizer = getattr(model, "hf_quantizer", None)
    method = quantizer.quantization_config.quant_method if quantizer is not None else QUANT_METHOD
    if method != QUANT_METHOD:
        raise already_quantized("The model", method)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    named = linears | {n: m for n, m in model.named_modules() if experts_shape(m)}
    if config.target_modules is None:
        chosen = _default_targets(model, linears)
    else:
        chosen = _select("target_modules", config.target_modules, named)
    excluded = _select("exclude_modules", config.exclude_modules or [], named)
    targets: dict[str, nn.Module] = {
        name: linears[name] for name in linears if name in chosen and name not in excluded
    }
    if not targets:
        raise TargetError(
            f"No linear layer of {type(model).__name__} is left to factorize; name some with "
            f"target_modules. It has, for example: {', '.join(list(linears)[:5]) or 'none'}."
        )
    _refuse_head(model, targets)
    _check_ranks(targets, config)
    return targets


def fixed_ranks(targets: Mapping[str, nn.Module], config: LowRankConfig) -> dict[str, int | None]:
    """Ranks that the config fixes by hand, resolved to layer names; later patterns win."""
    fixed: dict[str, int | None] = {}
    for pattern, rank in config.rank_pattern.items():
        fixed |= {name: rank for name in targets if match_name(name, pattern)}
    if config.inference_form == "compact":  # at full rank that is the dense layer
        shapes = {name: linear_shape(targets[name]) for name in fixed}
        fixed = {n: rank and useful_rank(shapes[n], rank, "compact") for n, rank in fixed.items()}
    return fixed


def untouched_weights(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, int]:
    """Matrices inside the transformer blocks that are not targeted, and their parameter counts.

    Fused expert weights (3-D parameters) are the usual case: they hold most of a mixture of
    experts, and a report must not pass over them in silence.
    """
    targeted = {id(parameter) for layer in targets.values() for parameter in layer.parameters()}
    blocks = _block_names(model)
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in targeted and _is_below(name, blocks)
    }


def refuse_unloaded(model: nn.Module) -> None:
    """Refuses a model that has no device to send a batch to.

    One that accelerate offloads in part works: what is offloaded stays dense.

    Raises:
        TargetError: Its first weights, the embeddings of most models, are on the meta device.
    """
    name, parameter = next(model.named_parameters(), ("", None))
    if parameter is not None and parameter.device.type == "meta":
        raise TargetError(
            f"{name}: is on the meta device, offloaded or never loaded; load the model where its "
            "weights fit, with a device_map that offloads none."
        )


def match_name(name: str, pattern: str) -> bool:
    """Whether a pattern means this module: in full, by trailing parts, or with wildcards.

    Whole parts only: `layer.1` means `encoder.layer.1`, not `encoder.layer.11`.
    """
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def _select(setting: str, patterns: Iterable[str], layers: Mapping[str, Value]) -> set[str]:
    selected: set[str] = set()
    for pattern in patterns:
        matched = {name for name in layers if match_name(name, pattern)}
        if not matched:
            raise TargetError(
                f"{setting}: {pattern!r} matches no linear layer; the model has, for example: "
                f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in layers})[:12])}."
            )
        selected |= matched
    return selected


def _default_targets(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[str]:
    blocks = _block_names(model)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    names = [name for name, layer in linears.items() if layer is not head]
    inside = [name for name in names if _is_below(name, blocks)] if blocks else names[:-1]
    return {
        name
        for name in inside
        if name.rsplit(".", 1)[-1] not in _ROUTER_NAMES
        and break_even_rank(*linear_shape(linears[name])) > 1
    }


def _refuse_adapter(model: nn.Module) -> None:
    """An adapter saves itself alone, so the compressed weights under it would be lost."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            where = f"{type(module).__name__} of peft" + (f" at {name}" if name else "")
            raise TargetError(
                f"The model has an adapter ({where}); merge it first (merge_and_unload), or start "
                "from the model without it and train the adapter after the compression."
            )


def _refuse_head(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in targets.items():
        if layer is head:
            raise TargetError(f"{name}: is the output head, which is never factorized; exclude it.")


def _block_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def _is_below(name: str, ancestors: Iterable[str]) -> bool:
    return any(name.startswith(f"{ancestor}.") for ancestor in ancestors)


def _check_ranks(targets: Mapping[str, nn.Module], config: LowRankConfig) -> None:
    _select("rank_pattern", config.rank_pattern, targets)
    wanted = fixed_ranks(targets, config)
    if config.rank is not None:
        wanted = {name: wanted.get(name, config.rank) for name in targets}
    for name, rank in wanted.items():
        out_features, in_features = linear_shape(targets[name])
        if rank is not None and rank > min(out_features, in_features):
            raise ConfigError(
                f"{name}: rank {rank} exceeds min({out_features}, {in_features}); lower the rank "
                "or exclude the layer."
            )

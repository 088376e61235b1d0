"""Edits of a model's layers: factorize, take back, merge.

Only this folder and format/ (for loading) put layers into a model; others call them. Forward passes
are replaced for a while in measuring/projection.py and compression/streaming/block_stream.py.

The verbs with a trailing underscore work in place and check everything before their first edit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.channels.expert_order import Orders, of_experts, of_feed_forwards
from hf_lowrank.channels.narrowing import narrowed
from hf_lowrank.decomposition.pivots import compact_columns
from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.errors import TargetError, in_layer
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.forms.compact import CompactLinear
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.forms.stored_form import stored_form
from hf_lowrank.format.fused_experts import full_experts, small_experts
from hf_lowrank.format.marking import unmark_as_lowrank_
from hf_lowrank.format.rebuild import compressed_layers
from hf_lowrank.format.torchao_weights import quantized_modules
from hf_lowrank.measuring.passes import stream_of
from hf_lowrank.ranks.plan import RankPlan

_ADVICE = "Exclude the layer, or use other calibration data."


def replace_layer_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in another's place; training mode and gradient flags are the new layer's."""
    model.set_submodule(name, layer)


@torch.no_grad()
def empty_lowrank(source: nn.Module, rank: int, form: str = "factors") -> LowRankLinear:
    """A `LowRankLinear` of a layer's sizes, dtype, device and mode, with its bias; no factors yet.

    Args:
        source: The dense or low-rank layer that it will replace.
        rank: Rank of the new layer.
        form: "factors", "compact" or "usv".
    """
    if isinstance(source, LowRankLinear):
        weight, conv1d = source.lowrank_B.weight, source.conv1d
    else:
        weight, conv1d = cast(torch.Tensor, source.weight), isinstance(source, Conv1D)
    bias = cast("torch.Tensor | None", source.bias)
    lowrank = stored_form(form).build(
        linear_shape(source),
        rank,
        bias=bias is not None,
        conv1d=conv1d,
        device="meta",  # no random start, so the random state is left alone
        dtype=weight.dtype,
    )
    lowrank = cast(LowRankLinear, lowrank).to_empty(device=weight.device)
    if bias is not None and lowrank.bias is not None:
        lowrank.bias.copy_(bias)
    lowrank.train(source.training)
    for parameter in lowrank.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return lowrank


@torch.no_grad()
def lowrank_from_factors(
    layer: nn.Module, factors: Factors, rank: int, form: str = "factors"
) -> LowRankLinear:
    """A layer of a rank that approximates another, with its bias, dtype and device."""
    lowrank = empty_lowrank(layer, rank, form)
    if isinstance(lowrank, CompactLinear):
        fill_compact_(lowrank, factors.left, factors.right)
        return lowrank
    factor_a, factor_b = factors.balanced(rank)
    lowrank.lowrank_A.weight.copy_(factor_a)
    lowrank.lowrank_B.weight.copy_(factor_b)
    return lowrank


@torch.no_grad()
def fill_compact_(layer: CompactLinear, left: torch.Tensor, right: torch.Tensor) -> None:
    """Fills a compact layer with the best approximation of its rank to `left @ right`, in place.

    Args:
        layer: The layer.
        left: Shape (m, r).
        right: Shape (r, n); components in descending order.
    """
    rank, dtype = layer.rank, layer.lowrank_B.weight.dtype
    if layer.by_inputs:
        pivots, coefficients, order = compact_columns(left, right, rank, dtype)
        layer.lowrank_B.weight.copy_(pivots)
        layer.lowrank_A.weight.copy_(coefficients)
    else:
        pivots, coefficients, order = compact_columns(right.T, left.T, rank, dtype)
        layer.lowrank_A.weight.copy_(pivots.T)
        layer.lowrank_B.weight.copy_(coefficients.T)
        order = order.argsort()  # from what stands at a place to the place of each output
    layer.lowrank_order.copy_(order)


def factorize_(
    model: nn.Module,
    factors: Mapping[str, Factors],
    plan: RankPlan,
    orders: Orders | None = None,
) -> dict[str, nn.Module]:
    """Replaces the planned layers by factors, or by narrower layers, in place.

    Args:
        model: The dense model.
        factors: Factors of every layer that the plan gives a rank.
        plan: Ranks by layer name; None leaves a layer dense, or narrowed if the plan says so.
        orders: Channel order of each feed-forward that the plan narrows, keyed by its output
            layer, and order of the experts of which it takes some away, by their name.

    Returns:
        The dense layers that were replaced, by name; `restore_` puts them back.

    Raises:
        TargetError: A planned layer is missing, has another shape, or has no spectrum.
        NumericalError: Nothing can be fitted to a layer's factors or channels. Nothing has been
            edited in either case.
    """
    chosen = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    originals = {name: _planned_layer(model, name, plan) for name in {**chosen, **plan.narrowed}}
    for name in chosen.keys() - factors.keys():
        raise TargetError(
            f"{name}: the plan gives it a rank, but it was not decomposed; analyze it, too."
        )
    blocks = {n: each for n, each in of_feed_forwards(orders).items() if n in plan.narrowed}
    covered = {name for each in blocks.values() for name in each.block.names}
    for name in plan.narrowed.keys() - covered:
        raise TargetError(
            f"{name}: the plan narrows it, but its channels were not ordered; analyze them."
        )
    for output, each in blocks.items():
        for name, shape in each.shapes(plan.shapes, plan.narrowed[output][1]).items():
            if tuple(plan.narrowed.get(name, plan.shapes[name])) != shape:
                raise TargetError(
                    f"{name}: the plan gives it shape {plan.narrowed.get(name)}, which does not "
                    f"fit that of {output}."
                )
    layers = _smaller_experts(model, plan, orders)
    originals |= {name: model.get_submodule(name) for name in layers}
    for name, each in blocks.items():
        with in_layer(name, _ADVICE):
            layers |= narrowed(model, each.block, each.narrowing(model, plan.narrowed[name][1]))
    for name, rank in chosen.items():
        with in_layer(name, _ADVICE):
            layers[name] = lowrank_from_factors(originals[name], factors[name], rank, plan.form)
    restore_(model, layers)
    return originals


def _smaller_experts(
    model: nn.Module, plan: RankPlan, orders: Orders | None
) -> dict[str, nn.Module]:
    """Experts that lose channels or whole ones, and their routers, by name."""
    known, layers = of_experts(orders), dict[str, nn.Module]()
    for name, left in plan.experts.items():
        if left.is_cut and name not in known:
            raise TargetError(
                f"{name}: the plan takes experts away, but they were not ordered; analyze them."
            )
        layers |= known[name].smaller(model, left) if left.is_cut else {}
    return layers


def restore_(model: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Puts dense layers back where `factorize_` replaced them, in place."""
    for name, layer in originals.items():
        replace_layer_(model, name, layer)


@contextmanager
def factorized(
    model: nn.Module,
    factors: Mapping[str, Factors],
    plan: RankPlan,
    orders: Orders | None = None,
    *,
    form: str = "factors",
) -> Iterator[nn.Module]:
    """The model with the plan in force for the time of the block, dense again afterwards.

    Args:
        model: The dense model.
        factors: As in `factorize_`, as the next two.
        plan: Ranks and narrowed layers.
        orders: Channel orders.
        form: Stored form of the layers in the block. Two factors compute the same as any other,
            but for rounding, and take no work to make.
    """
    plan = dataclasses.replace(plan, form=form)
    if (stream := stream_of(model)) is not None:
        with stream.cut(factors, plan, orders or {}):
            yield model
        return
    originals = factorize_(model, factors, plan, orders)
    try:
        yield model
    finally:
        restore_(model, originals)


@contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The model with other layers in place for the time of the block."""
    current = {name: model.get_submodule(name) for name in layers}
    restore_(model, layers)
    try:
        yield model
    finally:
        restore_(model, current)


def merge_(model: nn.Module) -> nn.Module:
    """Multiplies all factors out, in place: a plain dense model with the same outputs.

    Feed-forwards and experts that lost channels get their full width back, with zeros in those.
    Also removes the low-rank entries from the model's config, so that it is saved as a dense model.

    Raises:
        TargetError: The model has no low-rank or narrowed layer, one has an adapter, or experts
            were dropped. Nothing has been edited then.
    """
    layers = compressed_layers(model)
    whole = {name: full_experts(name, each) for name, each in small_experts(model).items()}
    if not layers and not whole:
        raise TargetError("The model has no low-rank or narrowed layer to merge.")
    _refuse_adapters(layers)
    for name, layer in layers.items():
        dense = layer.to_dense()
        dense.train(layer.training)
        trains = next(layer.parameters()).requires_grad or bool(quantized_modules(layer))
        for parameter in dense.parameters():
            parameter.requires_grad_(trains)
        replace_layer_(model, name, dense)
    restore_(model, whole)
    if hasattr(model, "config"):
        unmark_as_lowrank_(model)
    return model


def _refuse_adapters(layers: Mapping[str, nn.Module]) -> None:
    """Refuses layers with anything around their weights, of which a product knows nothing."""
    for name, layer in layers.items():
        factors = [layer.lowrank_A, layer.lowrank_B] if isinstance(layer, LowRankLinear) else []
        is_plain = all(type(factor) is nn.Linear for factor in factors)
        # PEFT calls the layer under an adapter base_layer.
        if not is_plain or name.endswith(".base_layer"):
            raise TargetError(
                f"{name.removesuffix('.base_layer')}: its weights are no plain nn.Linear, and "
                "merging would lose what is added to them; merge_and_unload the adapter first."
            )


def _planned_layer(model: nn.Module, name: str, plan: RankPlan) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise TargetError(f"{name}: the model has no such layer.") from None
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise TargetError(
            f"{name}: only nn.Linear and Conv1D can be factorized, not {type(layer).__name__}."
        )
    if linear_shape(layer) != tuple(plan.shapes[name]):
        raise TargetError(
            f"{name}: the layer has shape {linear_shape(layer)}, the plan was made for "
            f"{tuple(plan.shapes[name])}."
        )
    return layer

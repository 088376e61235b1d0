"""The forms of a low-rank layer: compact or `B A` for inference, `U diag(s) V` for training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.decomposition.thin import finite_svd, thin_svd
from hf_lowrank.errors import TargetError, in_layer
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.rebuild import factorized_layers, narrowed_layers
from hf_lowrank.modeling.qualification import qualified
from hf_lowrank.modeling.surgery import empty_lowrank, lowrank_from_factors, replace_layer_
from hf_lowrank.modeling.targets import fixed_ranks
from hf_lowrank.modeling.weight_precision import refuse_quantized
from hf_lowrank.ranks.plan import break_even_rank


@torch.no_grad()
def to_training_form_(model: nn.Module, config: LowRankConfig) -> dict[str, LowRankLinear]:
    """Turns target layers into `U diag(s) V`, in place: full rank, or as `rank_pattern` says.

    A model that already has low-rank layers keeps their ranks; only their form changes. With
    every layer at full rank the model computes what it did before.

    Args:
        model: A dense or a compressed model.
        config: Targets and fixed ranks.

    Returns:
        The layers in training form, by name.

    Raises:
        TargetError, ConfigError: The model has quantized weights, or narrowed layers alone; or see
            `qualified`.
    """
    refuse_quantized(model)
    layers = factorized_layers(model)
    if layers:
        for name, layer in layers.items():
            if layer.lowrank_s is None:
                replace_layer_(model, name, _from_svd(layer, *thin_svd(*layer.factors())))
        return factorized_layers(model)
    if narrowed_layers(model):
        raise TargetError(
            "The model's feed-forwards lost channels, but no layer has a rank, so there is none to "
            "select; train it with Trainer."
        )
    targets = qualified(model, config).targets
    fixed = fixed_ranks(targets, config)
    for name, dense in targets.items():
        rank = fixed.get(name, min(linear_weight(dense).shape))
        if rank is not None:
            with in_layer(name, "Load another checkpoint, or exclude the layer."):
                U, s, Vh = finite_svd(linear_weight(dense).double())
            replace_layer_(model, name, _from_svd(dense, U[:, :rank], s[:rank], Vh[:rank]))
    return factorized_layers(model)


@torch.no_grad()
def to_inference_form_(model: nn.Module, form: str = "factors") -> nn.Module:
    """Folds `s` away, in place; a layer at or above break-even becomes dense.

    Args:
        model: A model with layers in training form.
        form: "factors" or "compact".
    """
    for name, layer in factorized_layers(model).items():
        if layer.rank >= break_even_rank(layer.out_features, layer.in_features, form):
            replace_layer_(model, name, layer.to_dense())
        elif layer.lowrank_s is not None:
            factors = Factors(*layer.factors())
            replace_layer_(model, name, lowrank_from_factors(layer, factors, layer.rank, form))
    return model


def reshape_(model: nn.Module, ranks: Mapping[str, int | None]) -> None:
    """Gives layers other ranks in training form, None for dense, in place.

    The factors of a layer whose rank changes are left empty, for a checkpoint to fill.
    """
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        now = layer.rank if isinstance(layer, LowRankLinear) else None
        if rank == now:
            continue
        if rank is not None:
            new: nn.Module = empty_lowrank(layer, rank, form="usv")
        elif isinstance(layer, LowRankLinear):
            new = layer.to_dense()
        replace_layer_(model, name, new)


def current_ranks(model: nn.Module, names: Mapping[str, object]) -> dict[str, int | None]:
    """Rank of each named layer now, None where it is dense."""
    modules = ((name, model.get_submodule(name)) for name in names)
    return {name: m.rank if isinstance(m, LowRankLinear) else None for name, m in modules}


def current_form(model: nn.Module) -> str:
    """Form of the model's low-rank layers, which all have the same."""
    return next((layer.form for layer in factorized_layers(model).values()), "factors")


def _from_svd(
    source: nn.Module, U: torch.Tensor, s: torch.Tensor, Vh: torch.Tensor
) -> LowRankLinear:
    layer = empty_lowrank(source, len(s), form="usv")
    if layer.lowrank_s is None:
        raise TypeError("the training form has a spectrum")
    layer.lowrank_B.weight.copy_(U)
    layer.lowrank_s.copy_(s)
    layer.lowrank_A.weight.copy_(Vh)
    return layer

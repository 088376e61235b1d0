"""How transformers rebuilds compressed layers: the quantization method "lowrank".

Importing this module registers it with transformers, unless that is done already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lowrank.format.forms.compact import CompactLinear
from hf_lowrank.format.fused_experts import full_experts, small_experts
from hf_lowrank.format.layout import FORMAT_VERSION, QUANT_METHOD, Layout
from hf_lowrank.format.marking import mark_as_lowrank_, unmark_as_lowrank_
from hf_lowrank.format.rebuild import (
    compressed_layers,
    factorized_layers,
    replace_with_lowrank_,
)
from hf_lowrank.format.torchao_weights import assemble_, check_torchao


class LowRankCheckpointConfig(QuantizationConfigMixin):
    """What a checkpoint needs to be rebuilt; other fields are kept as they are.

    Args:
        ranks: Module name to rank, None for a layer that stayed dense.
        form: "compact", "factors" or "usv"; see `LowRankLinear` and `CompactLinear`.
        narrowed: Module name to [out_features, in_features], for layers that lost channels.
        quantized: Name to bits and block, for modules whose weight is quantized.
        experts: Name to experts and width, for fused experts of which less is left.
        format_version: Version of the checkpoint layout.
        **extra: Fields that only hf_lowrank reads.
    """

    def __init__(
        self,
        ranks: dict[str, int | None] | None = None,
        form: str = "factors",
        narrowed: dict[str, list[int]] | None = None,
        quantized: dict[str, dict[str, Any]] | None = None,
        experts: dict[str, dict[str, int]] | None = None,
        format_version: int = FORMAT_VERSION,
        **extra: Any,
    ) -> None:
        extra.pop("quant_method", None)
        self.__dict__.update(extra)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.ranks = ranks
        self.form = form
        self.narrowed = narrowed
        self.quantized = quantized
        self.experts = experts
        self.format_version = format_version


class LowRankQuantizer(HfQuantizer):
    """Rebuilds low-rank layers on the meta device before `from_pretrained` reads the weights."""

    requires_calibration = True
    quantization_config: LowRankCheckpointConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called before anything is read.

        Raises:
            ConfigError: The weights are quantized and torchao is missing.
        """
        if self.pre_quantized and self.quantization_config.quantized:
            check_torchao("This checkpoint's weights are quantized, which")

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """Converts nothing, as for every method but two; transformers 4 needs accelerate for it."""

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if self.pre_quantized:
            replace_with_lowrank_(model, Layout.from_settings(self.quantization_config.to_dict()))
            _leave_uninitialized(model)

    def _process_model_after_weight_loading(
        self,
        model: nn.Module,
        **kwargs: Any,
    ) -> nn.Module:
        assemble_(model)
        for name, layer in factorized_layers(model).items():
            if isinstance(layer, CompactLinear) and not layer.lowrank_order.is_meta:
                layer.check_order(name)
        mark_as_lowrank_(model, self)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Low-rank models are saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters, unless they are quantized."""
        return not self.quantization_config.quantized

    @property
    def is_qat_trainable(self) -> bool:
        """Lets `Trainer` train the factors without an adapter on top."""
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` works on the factors."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:  # noqa: ANN401
        for name, layer in compressed_layers(model).items():
            model.set_submodule(name, layer.to_dense())
        for name, module in small_experts(model).items():
            model.set_submodule(name, full_experts(name, module))
        unmark_as_lowrank_(model)
        return model


def _leave_uninitialized(model: nn.Module) -> None:
    """Keeps a model's `_init_weights` off the factors.

    Some go by the names of their linear layers and would not know what these are.
    """
    for layer in compressed_layers(model).values():
        for part in layer.modules():
            part._is_hf_initialized = True  # type: ignore[assignment]


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, LowRankCheckpointConfig)
AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, LowRankQuantizer)

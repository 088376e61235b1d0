"""What vLLM asks a quantization method: which layers it holds, and how. Importing registers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from hf_lowrank.errors import CheckpointError, ConfigError
from hf_lowrank.format.layout import QUANT_METHOD, Layout
from hf_lowrank.format.strict import check
from hf_lowrank.serving.vllm.shards import ListedLayers
from hf_lowrank.serving.vllm.vllm_linear import SERVED, LowRankLinearMethod

# The models of vLLM that transpose a file's weights.
_TRANSPOSED = ("gpt2",)


@register_quantization_config(QUANT_METHOD)
class LowRankVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """A checkpoint of hf_lowrank, as vLLM serves it.

    Args:
        layout: What config.json says of the layers.

    Raises:
        CheckpointError: The layers are in the training form.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        if layout.form == "usv":
            raise CheckpointError(
                "form 'usv' is that of layers in training, which is not served; save what "
                "LowRankTrainer.export() returns."
            )
        self.layout = layout
        self.listed = ListedLayers(layout)
        self.is_transposed = False
        self.is_whole = True

    def get_name(self) -> str:
        """Always "lowrank"."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of dense models."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any: the products are those of dense layers."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json says it all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankVllmConfig:
        """Reads `quantization_config`.

        Raises:
            CheckpointError: The version or a value is none that is read, or the form is usv.
            ConfigError: Fused experts are smaller.
        """
        layout = Layout.from_settings(config)
        if layout.experts:
            raise ConfigError(
                f"{next(iter(layout.experts))}: has lost experts or channels, which vLLM's kernels "
                "are not told of; compress with channels=False to serve the model."
            )
        return cls(layout)

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: Any = None,  # noqa: ANN401
        revision: str | None = None,
    ) -> None:
        """Checks the checkpoint's headers against its config, once and before any long work.

        Raises:
            CheckpointError: As `load` does.
        """
        check(model_name, revision=revision)
        self.is_transposed = getattr(hf_config, "model_type", None) in _TRANSPOSED

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:  # noqa: ANN401
        """Renames the listed layers as the model class names them."""
        fields = ("ranks", "narrowed", "quantized")
        renamed: dict[str, Mapping[str, Any]] = {
            field: hf_to_vllm_mapper.apply_dict(dict(getattr(self.layout, field)))
            for field in fields
        }
        self.layout = replace(self.layout, **renamed)  # type: ignore[arg-type]
        self.listed = ListedLayers(self.layout)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:  # noqa: ANN401
        """How to hold the layer of this name; None for what is neither linear nor compressed.

        Raises:
            CheckpointError: It is compressed and of a kind that has to stay dense here.
            ConfigError: What is asked for together with compressed layers is not served.
        """
        self._check_run()
        if not isinstance(layer, LinearBase):
            inside = self.listed.below(prefix)
            if inside is not None:
                raise CheckpointError(_refusal(inside, layer))
            return None
        parent, _, last = prefix.rpartition(".")
        packed = self.packed_modules_mapping.get(last, [last])
        names = [f"{parent}.{each}".lstrip(".") for each in packed]
        compressed = next((name for name in names if self.listed.find(name)), None)
        if compressed is None:
            return UnquantizedLinearMethod()
        if type(layer) not in SERVED:
            raise CheckpointError(_refusal(compressed, layer))
        return LowRankLinearMethod(self.listed, names, self.is_transposed, self._check_claims)

    def _check_run(self) -> None:
        run = get_current_vllm_config()
        if run.lora_config is not None:
            raise ConfigError(
                "LoRA adapters on compressed layers are not served; leave out --enable-lora, or "
                "merge the adapter into a dense model first."
            )
        if self.online_quantization_config is not None:
            raise ConfigError(
                "compressed layers are not quantized while loading; leave the setting out, or "
                "compress with --weights int8 or int4."
            )
        self.is_whole = run.parallel_config.pipeline_parallel_size == 1

    def _check_claims(self) -> None:
        if self.is_whole and self.listed.unclaimed:
            raise CheckpointError(
                f"{min(self.listed.unclaimed)}: vLLM's model has no linear layer of this name that "
                "can be compressed."
            )


def _refusal(name: str, layer: nn.Module) -> str:
    return (
        f"{name} is compressed, but is {type(layer).__name__} in vLLM, which this plugin does not "
        "serve compressed; leave it dense (exclude_modules)."
    )

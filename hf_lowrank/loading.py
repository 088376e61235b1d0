"""How compressed models come back: the quantizer behind `from_pretrained`, and a strict `load`.

Importing this module registers the quantization method "lowrank" with transformers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_lowrank.analysis import analyze
from hf_lowrank.channels.feed_forward import named_feed_forwards
from hf_lowrank.checkpoint import check_checkpoint, tensor_shapes
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.errors import CheckpointError, ConfigError
from hf_lowrank.modeling_lowrank import (
    QUANT_METHOD,
    LowRankQuantizer,
    mark_as_lowrank,
    replace_with_lowrank,
    unmark_as_lowrank,
)
from hf_lowrank.surgery import factorize_, narrowed_layers

# Parameters and buffers that a model may have beyond four times its tensors' elements.
_SPARE_ELEMENTS = 10_000_000
# How much larger merging may make narrowed layers than all tensors are.
_MERGED = 100


class LowRankHfQuantizer(LowRankQuantizer):
    """Rebuilds low-rank checkpoints, and compresses dense ones while they are loaded.

    `from_pretrained("gpt2", quantization_config=LowRankConfig(param_ratio=0.8, metric="plain"))`
    has no data, so the metric must be one that needs none and the goal a size.
    """

    requires_calibration = False
    quantization_config: LowRankConfig  # type: ignore[assignment]

    def __init__(self, quantization_config: LowRankConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config = quantization_config
        if self.pre_quantized:
            if config.ranks is None:
                raise CheckpointError(
                    "config.json names quant_method 'lowrank' but holds no ranks; the checkpoint "
                    "is incomplete."
                )
        elif METRICS[config.metric].needs:
            raise ConfigError(
                f"from_pretrained has no calibration data, which metric {config.metric!r} needs; "
                "use LowRankConfig(metric='plain', param_ratio=...), or load the dense model and "
                "call hf_lowrank.compress."
            )
        elif config.goal == "loss_tolerance":
            raise ConfigError(
                "from_pretrained can't measure a loss; give LowRankConfig a param_ratio or a rank."
            )

    def _process_model_after_weight_loading(
        self,
        model: nn.Module,
        **kwargs: Any,
    ) -> nn.Module:
        if not self.pre_quantized:
            self.quantization_config = _compress_without_data(model, self.quantization_config)
            self.pre_quantized = True
        return super()._process_model_after_weight_loading(model, **kwargs)


def _compress_without_data(model: nn.Module, config: LowRankConfig) -> LowRankConfig:
    analysis = analyze(model, config, progress=False)
    if config.param_ratio is not None:
        plan = analysis.plan_for_ratio(config.param_ratio)
    else:
        plan = analysis.plan_for_rank(config.rank or 1)
    factorize_(model, analysis.spectra, plan)
    return config.replace(ranks=dict(plan.ranks), narrowed=None, form="factors")


def attach_config(model: nn.Module, config: LowRankConfig | None) -> None:
    """Marks a model's config with what was decided, so that it is saved as low-rank.

    Which layers are narrowed is read off the model. With None the marks are removed again. Models
    without a transformers config are left alone.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return
    if config is None:
        unmark_as_lowrank(model)
    else:
        layers = narrowed_layers(model)
        config = config.replace(narrowed={n: [*m.weight.shape] for n, m in layers.items()} or None)
        mark_as_lowrank(model, LowRankHfQuantizer(config, pre_quantized=True))


def load(folder: str | Path, **kwargs: Any) -> nn.Module:
    """Loads a compressed checkpoint and refuses anything that does not fit exactly.

    Args:
        folder: Checkpoint folder, or a repository id on the Hub.
        **kwargs: Passed on to `from_pretrained` (`dtype`, `device_map`, ...).

    Returns:
        The native transformers model, in eval mode.

    Raises:
        CheckpointError: The folder is no compressed checkpoint, its config does not fit its
            tensors, or keys are missing or left over.
    """
    config = check_checkpoint(folder)
    if (Path(folder) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds an adapter beside the model; move it to a folder of its own and load "
            "it with peft.PeftModel.from_pretrained."
        )
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and hasattr(model_class, "from_pretrained")):
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} has no class {name or listed!r}, "
            "which config.json names as the architecture."
        )
    try:
        _check_shapes(folder, model_class)
        model, info = model_class.from_pretrained(
            folder, output_loading_info=True, **({"use_safetensors": True} | kwargs)
        )
    except CheckpointError:
        raise
    except Exception as error:  # a damaged checkpoint can raise anything
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(str(key) for key in info[kind])
            raise CheckpointError(
                f"{folder}: {len(names)} {kind.replace('_', ' ')}, for example {names[0]}; the "
                "checkpoint does not fit its config."
            )
    loaded: nn.Module = model
    return loaded


def _check_shapes(folder: str | Path, model_class: Any) -> None:  # noqa: ANN401
    """Compares the tensors' headers with the model that the config describes, on meta.

    Raises:
        CheckpointError: With the first tensor that has another shape, or if the model is far
            larger than the file.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings: LowRankConfig = LowRankConfig.from_dict(config.quantization_config)
    with torch.device("meta"):
        skeleton = model_class(config)
        replace_with_lowrank(skeleton, settings.ranks or {}, settings.form, settings.narrowed)
    small = narrowed_layers(skeleton)
    blocks = named_feed_forwards(skeleton, small)
    for name in small.keys() - {name for _, block in blocks for name in block.names}:
        raise CheckpointError(
            f"{folder}: config.json narrows {name} to {[*small[name].weight.shape]}, which does "
            "not fit the other layers of its feed-forward."
        )
    shapes = tensor_shapes(folder)
    stored = sum(math.prod(shape) for shape in shapes.values())
    wanted = sum(t.numel() for t in (*skeleton.parameters(), *skeleton.buffers()))
    if wanted > 4 * stored + _SPARE_ELEMENTS:
        raise CheckpointError(
            f"{folder}: config.json describes a model of {wanted:,} numbers, the tensors hold "
            f"{stored:,}."
        )
    merged = sum(math.prod(layer.dense_shape) for layer in small.values())
    if merged > _MERGED * stored + _SPARE_ELEMENTS:
        raise CheckpointError(
            f"{folder}: config.json says that the narrowed layers once had {merged:,} weights, the "
            f"tensors hold {stored:,} numbers."
        )
    for name, tensor in skeleton.state_dict().items():
        if name in shapes and list(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {shapes[name]}, config.json asks for "
                f"{list(tensor.shape)}."
            )


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LowRankConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LowRankHfQuantizer

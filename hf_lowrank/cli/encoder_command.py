"""What scripts/compress_encoder.py does: an encoder in, a smaller one out, its embeddings kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.cli.arguments import PublishingArguments
from hf_lowrank.cli.encoder_arguments import EncoderArguments
from hf_lowrank.cli.jobs import check_before_loading, check_loaded, hand_over, used_texts
from hf_lowrank.cli.onnx_export import check_onnx, export_onnx, quantize_onnx
from hf_lowrank.compression.verbs import compress, sweep
from hf_lowrank.evaluation.similarity import Pairs, similarity
from hf_lowrank.inputs.encoders import Encoder, load_encoder
from hf_lowrank.inputs.sentences import PAIR_COLUMNS, read_pairs, sentence_batches, tokenized
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.items import Batch
from hf_lowrank.measuring.progress import announce
from hf_lowrank.report.embedding_report import EmbeddingReport, Similarity
from hf_lowrank.report.schema import Report

_PARTS = {"calibration": (0.0, 0.75), "held_out": (0.75, 1.0)}


def compress_encoder(args: EncoderArguments, publishing: PublishingArguments) -> None:
    """The whole job: loads, compresses, prints, saves, publishes; see the fields of the arguments.

    Raises:
        LowRankError: Before any long work, where something does not fit.
    """
    config, folder = args.to_config(), Path(args.output_dir) if args.output_dir else None
    repositories = check_before_loading(args, publishing, folder)
    if args.onnx or args.onnx_int8:
        check_onnx()
    columns = args.sts_columns or PAIR_COLUMNS
    scored = read_pairs(Path(args.sts_file), columns) if args.sts_file else None
    announce(f"load {args.model}")
    encoder = load_encoder(
        args.model, args.pooling, args.dtype, args.device, args.trust_remote_code
    )
    check_loaded(encoder.model, config, args, folder)
    texts = _texts(args, encoder)
    pairs = None if scored is None else _pairs(args, encoder, scored)
    before = None if pairs is None else similarity(encoder.model, pairs, encoder.loss)
    reports = _reports(args, encoder, texts)
    for (name, repo_id), report in zip(repositories.items(), reports, strict=True):
        if not current_processes().is_main:
            continue
        assert isinstance(report, EmbeddingReport)  # the loss says so
        if pairs is not None and before is not None:
            after = similarity(encoder.model, pairs, encoder.loss)
            found = (before.pearson, before.spearman, after.pearson, after.spearman)
            report.similarity = Similarity(str(args.sts_file), len(pairs[2]), *found)
        place, used = folder / name if folder else None, used_texts(args, texts)
        hand_over(
            *(encoder.model, encoder.tokenizer, report, used, args, publishing, place, repo_id),
            processor=encoder.files,
            finish=_finish(args, encoder),
        )


def _finish(args: EncoderArguments, encoder: Encoder) -> Callable[[Path], None]:
    """What is written beside the model, by the folder."""

    def finish(temporary: Path) -> None:
        if args.onnx or args.onnx_int8:
            path = temporary / "onnx" / "model.onnx"
            export_onnx(encoder.model, encoder.tokenizer, encoder.loss, path)
            if args.onnx_int8:
                quantize_onnx(path, path.with_name("model_quint8.onnx"))

    return finish


def _texts(args: EncoderArguments, encoder: Encoder) -> dict[str, list[Batch]]:
    """Batches by role; held-out sentences are the end of the calibration text."""
    wanted = args.text_roles()
    return {
        role: list(
            sentence_batches(
                args.text_source(role),
                encoder.tokenizer,
                sentences=sentences,
                max_length=_length(args, encoder),
                role=role,
                part=_PARTS.get(role, (0.0, 1.0)) if "held_out" in wanted else (0.0, 1.0),
                batch_size=args.batch_size,
            )
        )
        for role, sentences in wanted.items()
    }


def _pairs(
    args: EncoderArguments, encoder: Encoder, scored: tuple[list[str], list[str], list[float]]
) -> Pairs:
    def batches(sentences: Sequence[str]) -> list[Batch]:
        length = _length(args, encoder)
        return list(
            tokenized(sentences, encoder.tokenizer, length, args.batch_size, by_length=False)
        )

    return batches(scored[0]), batches(scored[1]), scored[2]


def _length(args: EncoderArguments, encoder: Encoder) -> int:
    return min(args.max_length, encoder.max_length or args.max_length)


def _reports(
    args: EncoderArguments, encoder: Encoder, texts: dict[str, list[Batch]]
) -> Iterator[Report]:
    """One report for each size; the model is compressed while it is handled."""
    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("cache_dir", "recover_steps", "recover", "speed")
    }
    options |= {**texts, "loss_function": encoder.loss}
    if args.param_ratio and len(args.param_ratio) > 1:
        yield from sweep(encoder.model, args.to_config(), args.param_ratio, **options)
    else:
        yield compress(encoder.model, args.to_config(), **options)

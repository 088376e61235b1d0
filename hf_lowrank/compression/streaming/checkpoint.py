"""`compress_checkpoint`: from a folder of safetensors files to another, a block at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from torch import nn

from hf_lowrank.channels.expert_order import of_feed_forwards
from hf_lowrank.compression.application import (
    Dense,
    decided_config,
    measure_dense,
    report_on,
)
from hf_lowrank.compression.cache import add_batches, description
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.options import Run, RunOptions, read_texts, split_texts
from hf_lowrank.compression.recipe import possible_recipe, recipe_of
from hf_lowrank.compression.streaming.block_analysis import BlockAnalyst
from hf_lowrank.compression.streaming.block_stream import BlockStream, digest_of
from hf_lowrank.compression.streaming.space import check_space
from hf_lowrank.compression.streaming.tensors import CheckpointTensors
from hf_lowrank.compression.streaming.written import write_compressed
from hf_lowrank.compression.verbs import check_run
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.size import DenseSize
from hf_lowrank.files import atomic_folder, check_cache_folder, check_output_folder
from hf_lowrank.inputs.on_disk import open_causal_lm
from hf_lowrank.inputs.sources import DEMO, check_place, demo_folder, load_tokenizer
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.items import Batch
from hf_lowrank.measuring.losses import prepare_losses
from hf_lowrank.modeling.qualification import refuse_rescaling, without_unfit
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.schema import Report
from hf_lowrank.version import __version__

Save = Callable[[nn.Module, Report], None]


def compress_checkpoint(
    folder: str | Path,
    out: str | Path,
    config: LowRankConfig | None = None,
    calibration: Iterable[Batch] | None = None,
    evaluation: Iterable[Batch] | None = None,
    *,
    held_out: Iterable[Batch] | None = None,
    foreign: Iterable[Batch] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    work_dir: str | Path | None = None,
    overwrite: bool = False,
    moment_gib: float = RunOptions.moment_gib,
    progress: bool = True,
    save: Save | None = None,
) -> Report:
    """Compresses a causal language model from disk to disk, with one block in memory at a time.

    The result is that of `compress`, to rounding: the same code, fed block by block. Weights are
    read twice, and once more for each measurement of a loss. Under `torchrun` the processes of
    one machine share batches and layers out among them. Every step is kept in `work_dir`, so
    that a killed run that is started again goes on from there; a run of another model, text or
    setting starts afresh. See docs/methods.md, B.

    Args:
        folder: Dense checkpoint in safetensors files: a folder, a Hub id, or "demo".
        out: Folder for the compressed checkpoint; written under a temporary name first.
        config: As in `compress`; `megabytes` and times are not done block by block.
        calibration: As in `compress`, as the next three.
        evaluation: Batches for the report's before and after.
        held_out: Batches for searches and prices.
        foreign: Batches of another kind, for the report, too.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16"; blocks compute in it, too.
        device: Where blocks are run.
        trust_remote_code: Whether code that lies beside the weights may run.
        work_dir: Folder for what lies between, kept; by default one beside `out`, removed at last.
        overwrite: Whether an existing folder is replaced.
        moment_gib: Memory for moments, GiB; more layers of a block take more passes over it.
        progress: Whether to show progress.
        save: Called with the compressed model, whose `save_pretrained` writes the checkpoint, and
            the report; by default writes both and the tokenizer to `out`.

    Returns:
        The report.

    Raises:
        ConfigError, DataError, TargetError, CheckpointError: Before anything is computed.
        StorageError: `out` can't be used, or the disk is too full.
        NumericalError: A loss is NaN or infinite.
    """
    config, out = config or LowRankConfig(), Path(out)
    source = str(demo_folder()) if folder == DEMO else str(folder)
    if config.megabytes or config.objective == "latency":
        raise ConfigError(
            "megabytes and objective 'latency' are not done block by block; leave them out, or "
            "compress in memory."
        )
    work = _work_folder(work_dir, out, overwrite, Path(source))
    stream, named = _opened(source, config, work, dtype, device, trust_remote_code)
    texts = {"calibration": calibration, "held_out": held_out}
    texts |= {"evaluation": evaluation, "foreign": foreign}
    options = RunOptions(moment_gib=moment_gib, progress=progress)
    recipe, run = _prepare(stream, named, config, texts, options)
    place = work / f"stream-{_digest(stream, recipe, run, (dtype, device))}"
    is_main = stream.processes.is_main
    if is_main and not work_dir:
        _clear(work, place)
    check_space(stream, named, run, place, run.progress)
    stream.processes.wait()
    stream.folder = place / "states"
    report = _compress(stream, named, recipe, run, place)
    if is_main:
        (save or _Saved(source, out, overwrite, trust_remote_code))(stream.model, report)
        if not work_dir:
            shutil.rmtree(work)
    stream.processes.wait()
    return report


def _work_folder(work_dir: str | Path | None, out: Path, overwrite: bool, source: Path) -> Path:
    """Where all that lies between goes, once the output folder, and it, can be used."""
    work = Path(work_dir) if work_dir else None
    check_output_folder(out, overwrite, source=source, cache=work)
    if work is None:
        return out.with_name(f".{out.name}.stream")
    check_cache_folder(work)
    return work


def _opened(
    source: str, config: LowRankConfig, work: Path, dtype: str, device: str, trusted: bool
) -> tuple[BlockStream, dict[str, nn.Module]]:
    """A checkpoint's model without its weights, and the layers that the config asks for."""
    processes = current_processes()
    model, files = open_causal_lm(source, dtype, trusted)
    tensors = CheckpointTensors(model, files, check_place(dtype, device))
    tensors.check(source)
    refuse_rescaling(model)
    named = find_targets(model, config)
    return BlockStream(model, named, tensors, work, processes), named


def _prepare(
    stream: BlockStream,
    named: dict[str, nn.Module],
    config: LowRankConfig,
    texts: dict[str, Iterable[Batch] | None],
    options: RunOptions,
) -> tuple[LowRankConfig, Run]:
    """The config with its recipe, and the run, once all that can be refused at once is refused."""
    model = stream.model
    with stream.short():
        checked = read_texts(model, None, **texts)
        recipe = recipe_of(model, config, checked, None)
        split = split_texts(recipe, checked)
        for batches in (split.calibration, split.held_out, split.evaluation):
            if batches:
                prepare_losses(model, stream.on_device(batches[0]))
        recipe = possible_recipe(model, config, recipe, named)
        run = Run(split, options, processes=stream.processes)
        check_run(model, named, recipe, run)
    stream.once = {digest_of(batches) for batches in split.reported.values()}
    return recipe, run


def _compress(
    stream: BlockStream, named: dict[str, nn.Module], config: LowRankConfig, run: Run, place: Path
) -> Report:
    """Measures, analyzes, decides, writes and measures again."""
    model = stream.model
    before = measure_dense(model, named, run)
    analysis, reasons = BlockAnalyst(stream, named, config, run, place)()
    targets, left_dense = without_unfit(model, config, named, reasons)
    dense = Dense(targets, DenseSize.of(model, targets), before.losses, left_dense)
    decision = decide(model, analysis, run)
    decided = decided_config(decision.analysis.config, decision.plan)
    with run.stopwatch.phase("surgery"):
        quantization = write_compressed(
            stream,
            decision.analysis.factors,
            decision.plan,
            of_feed_forwards(decision.analysis.orders),
            decided,
            place,
            run.progress,
        )
    report = report_on(model, decision, decided, dense, run, is_cut=False)
    report.quantization = quantization
    return report


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What is written where the caller says nothing else."""

    source: str
    out: Path
    overwrite: bool
    trusted: bool

    def __call__(self, model: nn.Module, report: Report) -> None:
        with atomic_folder(self.out, self.overwrite) as temporary:
            model.save_pretrained(temporary)  # type: ignore[operator]
            report.save(temporary / "report.json")
            if not Path(self.source).is_dir() or any(Path(self.source).glob("tokenizer*")):
                load_tokenizer(self.source, self.trusted).save_pretrained(temporary)


def _digest(stream: BlockStream, config: LowRankConfig, run: Run, more: tuple[str, ...]) -> str:
    """Tells runs apart whose spectra may differ; a plan's own files are named by the plan."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(description(stream.model).encode())
    for path in stream.tensors.files:
        stat = path.resolve().stat()
        digest.update(f"{path.resolve().name} {stat.st_size} {stat.st_mtime_ns}".encode())
    goals = dict.fromkeys(("param_ratio", "loss_tolerance", "rank", "weights"))
    settings = dataclasses.asdict(config) | goals
    versions = (__version__, torch.__version__, transformers.__version__)
    digest.update(json.dumps([settings, more, versions], sort_keys=True, default=str).encode())
    add_batches(digest, run.texts.calibration or [])
    add_batches(digest, (run.texts.held_out or []) if config.measured_prices else [])
    return digest.hexdigest()


def _clear(work: Path, place: Path) -> None:
    """Removes what a run of another model, text or setting has left."""
    for other in work.iterdir() if work.is_dir() else ():
        if other != place:
            shutil.rmtree(other, ignore_errors=True)

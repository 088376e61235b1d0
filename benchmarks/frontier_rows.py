"""What the frontier compares: files that a user could download, how each is made and read again.

All but the dense fp32 row store what is not quantized, embeddings too, in bf16.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from benchmarks.low_bits import LowBitLinear, analyze_lost, correction_ranks, low_bit_layer
from benchmarks.recipe import analysis_of
from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.application import decided_config, quantize_
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.options import Run
from hf_lowrank.compression.recovery import RecoverySettings, recover_
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.size import model_sizes
from hf_lowrank.files import write_text
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.torchao_weights import assemble_
from hf_lowrank.inputs.sources import load_any_causal_lm
from hf_lowrank.measuring.embeddings import embedding_loss
from hf_lowrank.modeling.marks import attach_config_
from hf_lowrank.modeling.surgery import factorize_, replace_layer_, restore_
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.plan import RankPlan

STORED = torch.bfloat16
STEPS = 60  # of recovery
_WEIGHTS, _SETTINGS = "model.safetensors", "low_bits.json"


@dataclass(frozen=True)
class Artefact:
    """One row.

    Attributes:
        family: Rows of one line in the picture.
        dtype: Of the file's numbers that are not quantized.
        ratio: Kept share of the targeted layers' numbers, of rows that are cut.
        weights: torchao's type of the weights, "int8" or "int4".
        steps: Of recovery after the cut.
        bits: Of the weights by HQQ.
        extra: Numbers of a correction as a share of the layers' numbers.
    """

    family: str
    dtype: torch.dtype = STORED
    ratio: float | None = None
    weights: str | None = None
    steps: int = 0
    bits: int | None = None
    extra: float = 0.0


ROWS: dict[str, Artefact] = {
    "dense-fp32": Artefact("dense", torch.float32),
    "dense-bf16": Artefact("dense"),
    **{weights: Artefact("torchao", weights=weights) for weights in ("int8", "int4")},
    **{f"hqq{bits}": Artefact("HQQ", bits=bits) for bits in (4, 3, 2)},
    **{
        "-".join(filter(None, (f"{ratio:g}", weights))): Artefact(
            f"low rank{', ' * bool(weights)}{weights or ''}", ratio=ratio, weights=weights
        )
        for weights in (None, "int8", "int4")
        for ratio in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
    },
    **{
        f"{ratio:g}-recovered": Artefact("low rank, recovered", ratio=ratio, steps=STEPS)
        for ratio in (0.8, 0.6)
    },
    **{
        f"hqq{bits}+{extra:g}": Artefact(f"HQQ {bits} bit, corrected", bits=bits, extra=extra)
        for bits in (4, 3, 2)
        for extra in (0.05, 0.1)
    },
}


def missing_rows(names: list[str] | None, folder: Path) -> dict[str, Artefact]:
    """The rows of these names, of all without names, that have no file in the folder yet.

    Raises:
        ConfigError: There is no such row.
    """
    for name in names or []:
        if name not in ROWS:
            raise ConfigError(f"rows: there is no {name!r}; choose of {', '.join(ROWS)}.")
    return {name: ROWS[name] for name in names or ROWS if not (folder / f"{name}.json").exists()}


def load_language_model(source: str, dtype: str) -> nn.Module:
    """A causal language model from a folder, dense or compressed."""
    return load_any_causal_lm(source, dtype)[0]


@dataclass
class Workshop:
    """Makes rows of one dense model; what rows share is made once.

    Attributes:
        model: The dense model.
        tokenizer: Its tokenizer.
        run: Calibration and held-out text, and the `cache_dir`.
        notes: Folder of the seconds that shared work took when it was first done.
        loader: Reads a dense or a compressed model of its kind from a folder, in a type.
        analyzer: Makes what cuts are made from.
        analyses: What rows are cut from, by its name.
    """

    model: nn.Module
    tokenizer: Any
    run: Run
    notes: Path
    loader: Callable[[str, str], nn.Module] = load_language_model
    analyzer: Callable[[nn.Module, Run], Analysis] = analysis_of
    analyses: dict[str, Analysis] = field(default_factory=dict)

    def measure(
        self, row: Artefact, dtype: str, judge: Callable[[nn.Module], dict[str, Any]]
    ) -> dict[str, Any]:
        """Makes a row, and what the judge says of what was written."""
        parameters = model_sizes(self.model)[0]
        with tempfile.TemporaryDirectory() as place:
            seconds = self.make(row, Path(place))
            size = file_bytes(Path(place))
            model = self.load(row, Path(place), dtype)
        found = {
            "family": row.family,
            "bytes": size,
            "resident_bytes": resident_bytes(model),
            "parameters": parameters,
            "bits": 8 * size / parameters,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
        }
        return found | judge(model)

    def make(self, row: Artefact, folder: Path) -> float:
        """Writes a row's file into a folder; returns the seconds it took from the dense model."""
        shared = 0.0
        if row.ratio is not None:
            shared = self._analyze("recipe", row)
        elif row.extra:
            shared = self._analyze(f"hqq{row.bits}", row)
        started = time.perf_counter()
        if row.bits is not None:
            self._save_low_bits(row, folder)
        else:
            self._save(row, folder)
        return shared + time.perf_counter() - started

    def load(self, row: Artefact, folder: Path, dtype: str) -> nn.Module:
        """The model of a row's file, as it runs; the dense bf16 row computes in bf16."""
        if row.bits is None:
            is_floor = row.family == "dense" and row.dtype == STORED
            return self.loader(str(folder), "bfloat16" if is_floor else dtype)
        settings = json.loads((folder / _SETTINGS).read_text("utf-8"))
        model = copy.deepcopy(self.model)
        for name, rank in settings["ranks"].items():
            layer: Any = model.get_submodule(name)
            empty = LowBitLinear(
                linear_shape(layer),
                settings["bits"],
                rank,
                bias=layer.bias is not None,
                dtype=getattr(torch, dtype),
            )
            empty.expect_factors_()
            replace_layer_(model, name, empty)
        load_model(model, folder / _WEIGHTS)
        assemble_(model)
        return model.eval()

    def _analyze(self, name: str, row: Artefact) -> float:
        """Makes a shared analysis; returns the seconds it took when it was not cached yet."""
        started, note = time.perf_counter(), self.notes / f"{name}.json"
        if name not in self.analyses:
            if row.bits is None:
                self.analyses[name] = self.analyzer(self.model, self.run)
            else:
                targets = find_targets(self.model, LowRankConfig())
                self.analyses[name] = analyze_lost(self.model, targets, row.bits, STORED, self.run)
        if not note.exists():
            write_text(note, json.dumps({"seconds": time.perf_counter() - started}))
        return float(json.loads(note.read_text("utf-8"))["seconds"])

    def _save(self, row: Artefact, folder: Path) -> None:
        """A dense model, or one that is cut or in torchao's types, as `save_pretrained` has it."""
        with self._cut(row) as plan:
            model: Any = copy.deepcopy(self.model).to(row.dtype)
        if row.ratio is not None or row.weights is not None:
            settings = LowRankConfig(param_ratio=row.ratio or 1.0, weights=row.weights)
            config = decided_config(settings, plan)
            quantize_(model, plan.ranks, config, self.run)
            attach_config_(model, config)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @contextmanager
    def _cut(self, row: Artefact) -> Iterator[RankPlan]:
        """The model cut, and trained, for the time of the block."""
        targets = find_targets(self.model, LowRankConfig())
        shapes = {name: linear_shape(layer) for name, layer in targets.items()}
        if row.ratio is None:
            yield RankPlan(dict.fromkeys(shapes), shapes)
            return
        analysis = self.analyses["recipe"]
        config = analysis.config.replace(param_ratio=row.ratio)
        decision = decide(self.model, analysis.with_config(config), self.run)
        found = decision.analysis
        try:
            factorize_(self.model, found.factors, decision.plan, found.orders)
            if row.steps:
                texts = self.run.texts
                settings = RecoverySettings(row.steps)
                calibration, held_out = texts.calibration or [], texts.held_out or []
                loss = embedding_loss(self.model, self.run.options.loss_function)
                recover_(self.model, targets, calibration, held_out, settings, embedding=loss)
            yield decision.plan
        finally:
            restore_(self.model, targets)

    def _save_low_bits(self, row: Artefact, folder: Path) -> None:
        """A model in few bits, as the state dict that `load` reads."""
        assert row.bits is not None
        targets = find_targets(self.model, LowRankConfig())
        ranks, factors = dict.fromkeys(targets, 0), {}
        if row.extra:
            analysis = self.analyses[f"hqq{row.bits}"]
            ranks |= correction_ranks(analysis.spectra, row.extra)
            factors = dict(analysis.factors)
        model = copy.deepcopy(self.model).to(row.dtype)
        for name, layer in targets.items():
            small = low_bit_layer(layer, row.bits, row.dtype, ranks[name], factors.get(name))
            replace_layer_(model, name, small)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(folder / _WEIGHTS))
        write_text(folder / _SETTINGS, json.dumps({"bits": row.bits, "ranks": ranks}))


def file_bytes(folder: Path) -> int:
    """Bytes of the weights' files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def in_turn_speed(dense: Sequence[float], row: Sequence[float], count: int) -> dict[str, Any]:
    """What a row does in a second by its median time, and how many times the dense model's.

    Args:
        dense: Seconds of the dense model in each round.
        row: Seconds of the row in the same rounds.
        count: What is done in this time.
    """
    return {
        "per_second": count / min(row),
        "ratio": min(dense) / min(row),
        "seconds": {"dense": list(dense), "row": list(row)},
    }


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in memory, those of torchao's tensors part by part."""
    return sum(map(_bytes_in_memory, (*model.parameters(), *model.buffers())))  # tied ones once


def _bytes_in_memory(tensor: torch.Tensor) -> int:
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        return tensor.numel() * tensor.element_size()
    return sum(_bytes_in_memory(getattr(tensor, name)) for name in parts()[0])

"""How well embeddings are kept at each size, without labels; and after training towards them.

Judged on the sentences of a development set that nothing else reads: correlation with people's
scores of pairs, mean cosine to the dense embeddings, and how many of the ten nearest neighbours
are the same. Rows are files of their own, so that a killed run goes on.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.application import dense_on_error, make_dense_again_
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.options import Run, RunOptions, Texts
from hf_lowrank.compression.recovery import RecoverySettings, recover_
from hf_lowrank.config import LowRankConfig, option
from hf_lowrank.evaluation.similarity import Correlations, correlations, embeddings
from hf_lowrank.evaluation.size import model_sizes
from hf_lowrank.inputs.encoders import Encoder, load_encoder
from hf_lowrank.inputs.sentences import read_pairs, read_sentences, tokenized
from hf_lowrank.measuring.embeddings import with_embeddings
from hf_lowrank.measuring.items import Batch
from hf_lowrank.modeling.surgery import factorize_
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.provenance import write_result

METHODS: dict[str, dict[str, Any]] = {
    "price and channels, compact": {"channels": True},
    "price and channels, factors": {"channels": True, "form": "factors"},
    "price, compact": {"channels": False},
    "price, factors": {"channels": False, "form": "factors"},
    "fisher-rows, factors": {"metric": "fisher-rows", "form": "factors"},
    "whitened, factors": {"metric": "whitened", "form": "factors"},
    "plain SVD, factors": {"metric": "plain", "form": "factors"},
}
FEWER_LAYERS = "fewer layers"
NEIGHBOURS = 10


@dataclass
class EmbeddingsArguments:
    """Arguments of the comparison on embeddings."""

    model: str = option("", "Dense encoder, as in compress_encoder.py.")
    pairs: str = option("", "Pairs of sentences with scores, which only the figures come from.")
    train_pairs: str | None = option(None, "Pairs whose sentences are calibrated and trained on.")
    texts: list[str] | None = option(None, "Texts, a sentence a line, that are so, too.")
    param_ratio: list[float] | None = option(None, "Sizes; default 0.75 0.5 0.35 0.25 0.16.")
    methods: list[str] | None = option(
        None, f"Methods; default all: {'; '.join(METHODS)}; {FEWER_LAYERS}."
    )
    calibration_sentences: int = option(1024, "Sentences for the moments.")
    train_sentences: int = option(8192, "Sentences that a recovery trains on.")
    held_out_sentences: int = option(256, "Sentences that a recovery is judged on.")
    max_length: int = option(128, "Tokens of each that are read.")
    batch_size: int = option(32, "Sentences in a batch.")
    recover_steps: int = option(0, "Steps of training after the cut; 0 for none.")
    recover_methods: list[str] | None = option(None, "Methods that are trained; default all.")
    learning_rate: float = option(3e-4, "Peak rate of that training.")
    layers: int = option(3, f"Layers that '{FEWER_LAYERS}' keeps, spread evenly.")
    seed: int = option(0, "Seed of everything random.")
    output_dir: str = option("outputs/embeddings", "Folder of rows; those in it are not run again.")


class Judge(NamedTuple):
    """The development sentences, each once, and the pairs of their numbers with scores."""

    batches: Sequence[Batch]
    pairs: torch.Tensor
    scores: Sequence[float]
    dense: torch.Tensor

    def measure(self, model: nn.Module, encoder: Encoder) -> dict[str, float]:
        """What the figures say of a model, shares of 1."""
        found = embeddings(model, self.batches, encoder.loss)
        cosines = (found[self.pairs[0]] * found[self.pairs[1]]).sum(dim=1)
        scores: Correlations = correlations(cosines.double().numpy(), self.scores)
        same = [
            len(set(one) & set(other)) / NEIGHBOURS
            for one, other in zip(_nearest(self.dense), _nearest(found), strict=True)
        ]
        return {
            **scores._asdict(),
            "cosine": float((found * self.dense).sum(dim=1).mean()),
            "neighbours": sum(same) / len(same),
        }


class Sentences(NamedTuple):
    """Batches by role."""

    calibration: Sequence[Batch]
    train: Sequence[Batch]
    held_out: Sequence[Batch]


def compare_embeddings(args: EmbeddingsArguments) -> None:
    """Every method at every size, a file for each."""
    encoder = load_encoder(args.model, dtype="float32")
    judge, sets = judge_of(args, encoder), sentences_of(args, encoder)
    folder = Path(args.output_dir)
    common = {
        "arguments": vars(args),
        "dense": judge.measure(encoder.model, encoder),
        "sentences": len(judge.dense),
    }
    ratios = args.param_ratio or [0.75, 0.5, 0.35, 0.25, 0.16]
    for method in args.methods or [*METHODS, FEWER_LAYERS]:
        analysis = None
        for ratio in [None] if method == FEWER_LAYERS else ratios:
            name = f"{method}-{ratio or args.layers}".replace(", ", "-").replace(" ", "_")
            path = folder / f"{name}.json"
            if path.exists():
                continue
            if ratio is None:
                change = _fewer_layers(encoder.model, args.layers)
            else:
                if analysis is None:
                    analysis = _analysis(method, args, encoder, sets)
                change = _cut(method, ratio, analysis, encoder, sets)
            row = {"method": method, "param_ratio": ratio}
            with change as changed:
                found = _row(args, method, encoder, changed, sets, judge)
            write_result(path, common | row | found)
            print(json.dumps(row | found), flush=True)
    print(
        format_embeddings([json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))])
    )


class Changed(NamedTuple):
    """What was put out of a model: dense parts by name, what to train, and the kept share."""

    originals: Mapping[str, nn.Module]
    trained: Sequence[nn.Parameter] | None
    kept: float


def _row(
    args: EmbeddingsArguments,
    method: str,
    encoder: Encoder,
    changed: Changed,
    sets: Sentences,
    judge: Judge,
) -> dict[str, Any]:
    """Figures of the changed model, before and after a recovery."""
    model = encoder.model
    found: dict[str, Any] = {"kept": changed.kept, "parameters": model_sizes(model)[0]}
    found["cut"] = judge.measure(model, encoder)
    if args.recover_steps and method in (args.recover_methods or [method]):
        settings = RecoverySettings(args.recover_steps, args.learning_rate, seed=args.seed)
        wall, cpu = time.perf_counter(), time.process_time()
        recovery = recover_(
            model,
            changed.originals,
            sets.train,
            sets.held_out,
            settings,
            embedding=encoder.loss,
            trained=changed.trained,
        )
        found["recovery"] = asdict(recovery) | {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
        found["recovered"] = judge.measure(model, encoder)
    return found


def _analysis(
    method: str, args: EmbeddingsArguments, encoder: Encoder, sets: Sentences
) -> Analysis:
    config = LowRankConfig(param_ratio=1.0, seed=args.seed, **METHODS[method])
    texts = Texts(sets.calibration, sets.held_out)
    run = Run(texts, RunOptions(encoder.loss, cache_dir=Path(args.output_dir) / "cache"))
    return analyze(encoder.model, find_targets(encoder.model, config), config, run)


@contextmanager
def _cut(
    method: str, ratio: float, analysis: Analysis, encoder: Encoder, sets: Sentences
) -> Iterator[Changed]:
    """The model cut to a size for the time of the block."""
    model = encoder.model
    found = analysis.with_config(analysis.config.replace(param_ratio=ratio))
    run = Run(Texts(sets.calibration, sets.held_out), RunOptions(encoder.loss))
    decision = decide(model, found, run)
    targets = find_targets(model, LowRankConfig())
    with dense_on_error(model, targets):
        factorize_(model, found.factors, decision.plan, found.orders)
        yield Changed(targets, None, decision.plan.param_ratio)
    make_dense_again_(model, targets)


@contextmanager
def _fewer_layers(model: Any, count: int) -> Iterator[Changed]:  # noqa: ANN401
    """A copy of some of the layers, spread evenly, in place of all for the time of the block."""
    dense = model.encoder.layer
    kept = [round(i * len(dense) / count) for i in range(count)]
    model.encoder.layer = nn.ModuleList(copy.deepcopy(dense[i]) for i in kept)
    named = model.encoder.layer.named_parameters()
    weights = [weight for _, weight in named if weight.ndim == 2]
    try:
        yield Changed({"encoder.layer": dense}, weights, count / len(dense))
    finally:
        model.encoder.layer = dense


def judge_of(args: EmbeddingsArguments, encoder: Encoder) -> Judge:
    """The development pairs, and the dense model's embeddings of their sentences."""
    first, second, scores = read_pairs(Path(args.pairs))
    numbers = {text: i for i, text in enumerate(sorted({*first, *second}, key=len))}
    batches = tokenized(list(numbers), encoder.tokenizer, args.max_length, args.batch_size)
    pairs = torch.tensor([[numbers[text] for text in texts] for texts in (first, second)])
    return Judge(batches, pairs, scores, embeddings(encoder.model, batches, encoder.loss))


def sentences_of(args: EmbeddingsArguments, encoder: Encoder) -> Sentences:
    """Shuffled sentences that the development pairs do not have, in three disjoint sets."""
    unseen = read_pairs(Path(args.pairs))
    lines: list[str] = []
    if args.train_pairs:
        first, second, _ = read_pairs(Path(args.train_pairs))
        lines += [*first, *second]
    for text in args.texts or []:
        lines += [line for line in read_sentences(text) if len(line) > 40]
    lines = sorted({*lines} - {*unseen[0], *unseen[1]})
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(args.seed)).tolist()
    chosen, sets = [lines[i] for i in order], []
    for count in (args.calibration_sentences, args.held_out_sentences, args.train_sentences):
        part, chosen = chosen[:count], chosen[count:]
        sets.append(tokenized(part, encoder.tokenizer, args.max_length, args.batch_size))
    held_out = with_embeddings(encoder.model, sets[1], encoder.loss)
    return Sentences(sets[0], [*sets[0], *sets[2]], held_out)


def _nearest(vectors: torch.Tensor) -> list[list[int]]:
    """Numbers of the nearest other vectors of each."""
    products = vectors @ vectors.T
    products.fill_diagonal_(-2.0)
    nearest: list[list[int]] = products.topk(NEIGHBOURS, dim=1).indices.tolist()
    return nearest


def format_embeddings(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each method and size; after the arrow what training has left."""
    header = ["method", "size", "Spearman", "of dense", "cosine", "same neighbours"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    names = {name: i for i, name in enumerate([*METHODS, FEWER_LAYERS])}
    for row in sorted(rows, key=lambda row: (-row["kept"] // 0.02, names[row["method"]])):
        dense = row["dense"]["spearman"]
        parts = [row["cut"], *([row["recovered"]] if "recovered" in row else [])]
        lines.append(
            [
                row["method"],
                f"{row['param_ratio'] or row['kept']:g}",
                " → ".join(f"{100 * part['spearman']:.2f}" for part in parts),
                " → ".join(f"{part['spearman'] / dense:.2%}" for part in parts),
                " → ".join(f"{part['cosine']:.4f}" for part in parts),
                " → ".join(f"{part['neighbours']:.1%}" for part in parts),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

"""One size in bytes reached in several ways: one type of weights for the whole model, or mixed.

Every way has the same spectra; whatever its type leaves of the size goes to ranks and channels.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.recipe import Judges, RecipeArguments, analysis_of, judges_of, rise, texts_of
from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.byte_budget import Fit, applied
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.options import Run, RunOptions
from hf_lowrank.config import config_option, option
from hf_lowrank.evaluation.perplexity import LossMeasurement
from hf_lowrank.evaluation.size import compare
from hf_lowrank.inputs.own_text import OwnText
from hf_lowrank.inputs.sources import load_causal_lm
from hf_lowrank.modeling.stored_size import SizeOnDisk
from hf_lowrank.report.provenance import write_result

WAYS = {"mixed": None, "int8": "int8", "int4": "int4"}


@dataclass
class SizeInBytesArguments(RecipeArguments):
    """Arguments of the comparison at sizes in bytes."""

    megabytes: list[float] | None = option(None, "Sizes of model.safetensors; default 200.")
    form: str | None = config_option("form")
    output_dir: str = option("outputs/bytes", "Folder of rows; those in it are not run again.")


def compare_types(args: SizeInBytesArguments) -> None:
    """Every way at every size, a file for each."""
    model, tokenizer = load_causal_lm(args.model, args.dtype)
    [source] = args.calibration or ["demo"]
    own_text = OwnText(model, tokenizer)
    texts, judges = texts_of(args, source, own_text), judges_of(args, own_text)
    judges = dataclasses.replace(judges, texts={"held out": texts.held_out or [], **judges.texts})
    run = Run(texts, RunOptions(cache_dir=args.cache_dir))
    dense, analysis, folder = judges.measure(model)[0], None, Path(args.output_dir)
    for megabytes in args.megabytes or [200.0]:
        for way, weights in WAYS.items():
            path = folder / f"{megabytes:g}-{args.form or 'compact'}-{way}.json"
            if path.exists():
                continue
            analysis = analysis or analysis_of(model, run)
            config = analysis.config.replace(
                param_ratio=None, megabytes=megabytes, weights=weights, form=args.form
            )
            row = {"way": way, "megabytes": megabytes, "form": config.inference_form}
            row |= _row(model, analysis.with_config(config), run, judges, dense)
            write_result(path, {"arguments": vars(args)} | row)
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    print(format_sizes(rows))


def _row(
    model: nn.Module,
    analysis: Analysis,
    run: Run,
    judges: Judges,
    dense: Mapping[str, LossMeasurement],
) -> dict[str, Any]:
    """What is chosen in one way, and what the judges say of it."""
    decision = decide(model, analysis, run)
    plan, weights = decision.plan, decision.bits or decision.analysis.config.weights
    fit = Fit(weights, plan, SizeOnDisk(model)(plan, weights))
    with applied(model, analysis, fit):
        losses, _ = judges.measure(model)
    return {
        "bytes": fit.size,
        "kept": plan.param_ratio,
        "ranks": sum(rank is not None for rank in plan.ranks.values()),
        "narrowed": len(plan.narrowed),
        "bits": dict(Counter(map(str, (decision.bits or {}).values()))),
        "texts": {name: dataclasses.asdict(compare(dense[name], losses[name])) for name in losses},
    }


def format_sizes(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each way at each size."""
    names = list(rows[0]["texts"])
    lines = [["size", "form", "types", "MB", "numbers kept", "low-rank", "narrowed", *names]]
    lines.append(["---"] * len(lines[0]))
    for row in sorted(rows, key=lambda each: (each["form"], -each["megabytes"])):
        types = ", ".join(f"{count} int{bits}" for bits, count in sorted(row["bits"].items()))
        cells = [f"{row['megabytes']:g}", row["form"], row["way"] + f" ({types})" * bool(types)]
        cells += [f"{row['bytes'] / 1e6:.1f}", f"{row['kept']:.3f}"]
        cells += [str(row["ranks"]), str(row["narrowed"])]
        lines.append(cells + [rise(row["texts"][name]) for name in names])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

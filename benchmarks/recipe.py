"""Which recipe is the default: channels, measured prices, calibration text; in and out of domain.

Every recipe is judged on text of the calibration's kind, on text of another kind and on questions,
none of which anything is tuned on. Rows are files of their own, so that a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.zero_shot import Question, answer_questions, read_questions
from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.byte_budget import Fit, applied
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.options import Run, RunOptions, Texts
from hf_lowrank.config import LowRankConfig, option
from hf_lowrank.evaluation.perplexity import LossMeasurement, measure_loss
from hf_lowrank.evaluation.size import compare
from hf_lowrank.inputs.own_text import OwnText
from hf_lowrank.inputs.sources import load_causal_lm
from hf_lowrank.inputs.start_token import start_text
from hf_lowrank.inputs.text import token_batches
from hf_lowrank.measuring.items import Batch
from hf_lowrank.modeling.stored_size import SizeOnDisk
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.provenance import write_result

RECIPES: dict[str, dict[str, Any]] = {
    "channels" * channels + "ranks" * (not channels) + "+measured" * measured + f", {form}": {
        "channels": channels,
        "measured_prices": measured,
        "form": form,
    }
    for form in ("factors", "compact")
    for channels in (False, True)
    for measured in (False, True)
}


@dataclass
class RecipeArguments:
    """Arguments of the comparison of recipes."""

    model: str = option("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = option(None, "Sizes; default 0.9 0.8.")
    recipes: list[str] | None = option(None, "Recipes; default " + " ".join(RECIPES) + ".")
    calibration: list[str] | None = option(
        None, "Calibration texts or mixtures, each tried; their last quarter is held out."
    )
    calibration_sequences: int = option(48, "Token windows for calibration.")
    held_out_sequences: int = option(12, "Token windows on which cuts are priced.")
    evaluation: list[str] | None = option(None, "Evaluation texts.")
    evaluation_sequences: int = option(32, "Token windows of each.")
    questions: list[str] | None = option(None, "Files of ARC or PIQA, as JSON lines.")
    question_limit: int = option(300, "Questions of each, from the start.")
    sequence_length: int = option(256, "Tokens in each window.")
    batch_size: int = option(4, "Windows in a batch.")
    weights: list[str] | None = option(None, "Types of weights tried on top: int8, int4.")
    dtype: str = option("float32", "Data type of the model.")
    cache_dir: str | None = option(None, "Folder for moments and spectra, to be used again.")
    output_dir: str = option("outputs/recipe", "Folder of rows; those in it are not run again.")


@dataclass(frozen=True)
class Judges:
    """What nothing is tuned on: texts and questions by name."""

    texts: Mapping[str, Sequence[Batch]]
    questions: Mapping[str, Sequence[Question]]
    tokenizer: Any

    def measure(self, model: nn.Module) -> tuple[dict[str, LossMeasurement], dict[str, list[bool]]]:
        """Losses by text, and which questions were answered rightly."""
        losses = {
            name: measure_loss(model, batches, progress=f"evaluate, {name}")
            for name, batches in self.texts.items()
        }
        answers = {
            name: answer_questions(model, self.tokenizer, questions, f"answer, {name}")
            for name, questions in self.questions.items()
        }
        return losses, answers


def compare_recipes(args: RecipeArguments) -> None:
    """Every recipe on every calibration text at every size, a file for each."""
    model, tokenizer = load_causal_lm(args.model, args.dtype)
    own_text = OwnText(model, tokenizer)
    judges = judges_of(args, own_text)
    folder = Path(args.output_dir)
    common = {"arguments": vars(args), "start_token": start_text(tokenizer)}
    dense = judges.measure(model)
    for calibration in args.calibration or ["demo"]:
        texts = texts_of(args, calibration, own_text)
        paths = {
            (recipe, ratio): folder
            / f"{_short(calibration)}-{recipe.replace(', ', '-')}-{ratio}.json"
            for ratio in args.param_ratio or [0.9, 0.8]
            for recipe in args.recipes or RECIPES
        }
        run = Run(texts, RunOptions(cache_dir=args.cache_dir))
        analysis = None
        for (recipe, ratio), path in paths.items():
            if path.exists():
                continue
            if analysis is None:
                analysis = analysis_of(model, run)
                common["analysis_seconds"] = run.stopwatch.seconds
            row = {"recipe": recipe, "param_ratio": ratio, "calibration": calibration}
            row |= _row(model, analysis, run, row, judges, dense, args.weights or [])
            write_result(path, common | row)
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*-*.json"))]
    print(format_recipes(rows))


def read_windows(
    args: RecipeArguments,
    source: str,
    role: str,
    own_text: OwnText,
    part: tuple[float, float] = (0.0, 1.0),
) -> Sequence[Batch]:
    """Batches of a role from a part of a text."""
    return token_batches(
        source,
        own_text.tokenizer,
        sequences=getattr(args, f"{role}_sequences"),
        sequence_length=args.sequence_length,
        role=role,
        part=part,
        batch_size=args.batch_size,
        own_text=own_text,
    )


def texts_of(args: RecipeArguments, source: str, own_text: OwnText) -> Texts:
    """Calibration text, and held-out text from its last quarter."""
    calibration = read_windows(args, source, "calibration", own_text, (0.0, 0.75))
    return Texts(calibration, read_windows(args, source, "held_out", own_text, (0.75, 1.0)))


def judges_of(args: RecipeArguments, own_text: OwnText) -> Judges:
    """The texts and questions that the arguments name."""
    texts = args.evaluation or ["demo"]
    return Judges(
        {Path(text).name: read_windows(args, text, "evaluation", own_text) for text in texts},
        {Path(f).stem: read_questions(Path(f), args.question_limit) for f in args.questions or []},
        own_text.tokenizer,
    )


def analysis_of(model: nn.Module, run: Run) -> Analysis:
    """Spectra, channels and their prices on held-out text, from which every plan is cut."""
    config = LowRankConfig(param_ratio=1.0, channels=True, measured_prices=True)
    return analyze(model, find_targets(model, config), config, run)


def _row(
    model: nn.Module,
    analysis: Analysis,
    run: Run,
    row: Mapping[str, Any],
    judges: Judges,
    dense: tuple[Mapping[str, LossMeasurement], Mapping[str, Sequence[bool]]],
    weights: Sequence[str],
) -> dict[str, Any]:
    """One recipe at one size: seconds to choose, and what the judges say of both models."""
    started, ratio = time.perf_counter(), row["param_ratio"]
    config = analysis.config.replace(param_ratio=ratio, **RECIPES[row["recipe"]])
    if not config.measured_prices:
        analysis = dataclasses.replace(analysis, held_out=None)
    decision = decide(model, analysis.with_config(config), run)
    plan, priced = decision.plan, decision.analysis
    seconds, size_of = time.perf_counter() - started, SizeOnDisk(model)
    found: dict[str, Any] = {
        "seconds": seconds,
        "kept": plan.param_ratio,
        "narrowed": len(plan.narrowed),
    }
    found["predicted"] = [priced.predicted_rise(plan), priced.standard_error(plan)]
    types = {}
    for each in (None, *weights):
        fit = Fit(each, plan, size_of(plan, each))
        asked = judges if each is None else dataclasses.replace(judges, questions={})
        with applied(model, analysis, fit):
            losses, answers = asked.measure(model)
        types[each or "own type"] = {
            "bytes": fit.size,
            "texts": {n: dataclasses.asdict(compare(dense[0][n], losses[n])) for n in losses},
            "questions": {name: _paired(dense[1][name], answers[name]) for name in answers},
        }
    return found | types.pop("own type") | {"quantized": types}


def _paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """Accuracies, and their difference with its standard error over questions."""
    size = len(before)
    changes = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    mean = sum(changes) / size
    spread = sum((change - mean) ** 2 for change in changes) / max(1, size - 1)
    return {
        "before": sum(before) / size,
        "after": sum(after) / size,
        "difference": mean,
        "standard_error": math.sqrt(spread / size),
        "questions": size,
    }


def format_recipes(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each recipe: perplexity and rise of the loss on each text, accuracies."""
    texts = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    questions = list(dict.fromkeys(name for row in rows for name in row["questions"]))
    predicts = any("predicted" in row for row in rows)
    header = ["calibration", "size", *["predicted"] * predicts, "recipe", "MB", *texts, *questions]
    lines = [header, ["---"] * len(header)]
    for row in sorted(rows, key=lambda each: (each["calibration"], -each["param_ratio"])):
        for kind, found in {"": row, **row.get("quantized", {})}.items():
            recipe = row["recipe"] + f", {kind}" * bool(kind)
            megabytes = f"{found['bytes'] / 1e6:.1f}" if "bytes" in found else ""
            cells = [_short(row["calibration"]), f"{row['param_ratio']:g}", recipe, megabytes]
            if predicts:
                cells.insert(2, _prediction(row.get("predicted")) if not kind else "")
            cells += [rise(found["texts"][name]) for name in texts]
            cells += [_accuracy(found["questions"].get(name)) for name in questions]
            lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _prediction(found: Sequence[float | None] | None) -> str:
    """The predicted rise of the loss, with its standard error where there is one."""
    if found is None or found[0] is None or math.isnan(found[0]):
        return ""
    return f"{found[0]:+.3f}" + ("" if found[1] is None else f" ± {found[1]:.3f}")


def rise(found: Mapping[str, Any]) -> str:
    """Perplexity, and the rise of the loss with its standard error."""
    rise, error = found["loss_difference"], found["standard_error"]
    return f"{found['perplexity_after']:.2f} ({rise:+.3f} ± {error:.3f})"


def _accuracy(found: Mapping[str, Any] | None) -> str:
    return f"{found['after']:.1%} (of {found['before']:.1%})" if found else ""


def _short(calibration: str) -> str:
    """Names of a mixture's files, good for a file name."""
    return "+".join(Path(each).name.replace(":", "_") for each in calibration.split(" + "))

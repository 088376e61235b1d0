"""A model, and a baseline if there is one: quality, speed and size as a result and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from hf_lowrank.evaluation.harness import run_tasks
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.evaluation.size import compare, model_sizes
from hf_lowrank.evaluation.speed import SpeedSettings, measure_speed
from hf_lowrank.inputs.sources import load_classifier
from hf_lowrank.measuring.items import Batch
from hf_lowrank.report.text.table import align
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task
from hf_lowrank.tasks.glue_data import TASKS

Result = dict[str, Any]


def evaluate_models(
    models: Mapping[str, nn.Module],
    tokenizer: Any,  # noqa: ANN401
    *,
    text: Sequence[Batch] | None = None,
    tasks: Mapping[str, Any] | None = None,
    speed: SpeedSettings | None = None,
) -> Result:
    """Everything that was asked for, by model.

    Args:
        models: "model", and "baseline" if there is one.
        tokenizer: Tokenizer of both.
        text: Evaluation text, for the perplexity.
        tasks: Zero-shot tasks, and how to run them: arguments of `run_tasks`.
        speed: What to time, both models in turn.

    Returns:
        `models`: by name, `parameters`, `bytes` and what was measured; `comparison`: the paired
        loss difference and the speed-ups over the baseline.
    """
    found: dict[str, Result] = {name: sizes_of(model) for name, model in models.items()}
    comparison: Result = {}
    if text is not None:
        losses = {name: measure_loss(model, text, progress=name) for name, model in models.items()}
        for name, loss in losses.items():
            found[name] |= {"loss": loss.mean, "perplexity": loss.perplexity}
            found[name]["evaluation_tokens"] = loss.positions
        if "baseline" in losses:
            difference = compare(losses["baseline"], losses["model"])
            comparison["loss_difference"] = difference.loss_difference
            comparison["standard_error"] = difference.standard_error
    if tasks is not None:
        for name, model in models.items():
            found[name]["tasks"] = run_tasks(model, tokenizer, **tasks)
    if speed is not None:
        times = measure_speed(models, speed)
        for name, each in times.items():
            found[name]["speed"] = {"settings": asdict(speed)} | asdict(each)
        if "baseline" in times:
            before, after = times["baseline"], times["model"]
            comparison["prefill_speed_up"] = before.prefill_seconds / after.prefill_seconds
            comparison["decode_speed_up"] = before.decode_seconds / after.decode_seconds
    return {"models": found, "comparison": comparison}


def score_classifiers(
    sources: Mapping[str, str],
    task: str,
    data_dir: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Result:
    """Fine-tuned classifiers on the validation examples of a GLUE task.

    Args:
        sources: Folder of each model, by name.
        task: Name of the task.
        data_dir: Folder with the original files; None for the Hub.
        dtype: As for `load_classifier`.
        device: Where to put the models.
        trust_remote_code: Whether code that lies beside the weights may run.

    Returns:
        As `evaluate_models`.
    """
    found: dict[str, Result] = {}
    for name, source in sources.items():
        settings = GlueArguments(
            model=source,
            trust_remote_code=trust_remote_code,
            task=task,
            data_dir=data_dir,
            train_samples=2,
        )
        examples = load_glue_task(settings)
        model = load_classifier(source, TASKS[task].num_labels, dtype, device, trust_remote_code)
        scores = examples.score(model, examples.validation)
        found[name] = sizes_of(model) | {"tasks": {task: scores}}
    return {"models": found, "comparison": {}}


def sizes_of(model: nn.Module) -> Result:
    """Parameters and bytes of a model, tied weights once."""
    parameters, size = model_sizes(model)
    return {"parameters": parameters, "bytes": size}


def format_evaluation(result: Result) -> str:
    """The result as a table with a column for each model."""
    names = sorted(result["models"])  # the baseline first
    flat = {name: _cells(result["models"][name]) for name in names}
    labels = list(dict.fromkeys(label for cells in flat.values() for label in cells))
    rows = [["", *names]]
    rows += [[label, *(flat[name].get(label, "-") for name in names)] for label in labels]
    comparison = result["comparison"]
    lines = [align(rows)]
    if "loss_difference" in comparison:
        lines.append(
            f"loss difference {comparison['loss_difference']:+.4f} "
            f"+- {comparison['standard_error']:.4f} nats per token"
        )
    if "decode_speed_up" in comparison:
        lines.append(
            f"speed-up over the baseline: prefill {comparison['prefill_speed_up']:.2f}, decode "
            f"{comparison['decode_speed_up']:.2f} (medians, timed in turn)"
        )
    return "\n".join(lines)


def _cells(found: Result) -> dict[str, str]:
    cells = {
        "parameters": f"{found['parameters']:,}",
        "megabytes": f"{found['bytes'] / 1e6:.1f}",
    }
    for key, label in (("perplexity", "perplexity"), ("loss", "loss (nats/token)")):
        if key in found:
            cells[label] = f"{found[key]:.4f}"
    for task, metrics in found.get("tasks", {}).items():
        cells |= {f"{task} {name}": f"{value:.4f}" for name, value in metrics.items()}
    for phase in ("prefill", "decode"):
        if "speed" in found:
            rate = found["speed"][f"{phase}_tokens_per_second"]
            cells[f"{phase} (tokens/s)"] = f"{rate:,.1f}"
    return cells

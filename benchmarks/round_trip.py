"""One class of transformers through compress, save, load, generate and merge."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_lowrank
from benchmarks.tiny_batches import TASKS, predictions, random_batches, three_tokens
from benchmarks.tiny_configs import tiny_config, tiny_model
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.format.fused_experts import small_experts
from hf_lowrank.format.rebuild import compressed_layers

# Largest difference, as a share of the largest logit, that is rounding and nothing else.
LOADED = 1e-6
MERGED = 1e-3
_BATCHES = 4
RECIPES = ("default", "plain")


@dataclass(frozen=True)
class Case:
    """A class of one of the auto mappings."""

    task: str
    model_type: str
    model_class: str


@dataclass
class Trip:
    """What became of one compression.

    Attributes:
        outcome: "ok", "refused", "differs", "failed", "untried", or "transformers" where the dense
            model does not come back from its own checkpoint either.
        detail: The sentence of a refusal, what differs, or the error's first line.
        step: The last step that was begun.
        layers: Compressed layers.
        differences: Largest difference of a logit from the compressed model in memory, as a share
            of the largest logit, by step.
    """

    outcome: str = "failed"
    detail: str = ""
    step: str = "build"
    layers: int = 0
    differences: dict[str, float] = field(default_factory=dict)


def round_trip(case: Case, recipe: str) -> Trip:
    """Compresses a tiny model of a class and takes it through every way out and in.

    Args:
        case: The class.
        recipe: "default" with batches of random tokens, or "plain" without any.

    Returns:
        What became of it; errors of any kind are caught.
    """
    trip = Trip()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _travel(case, recipe, Path(folder), trip)
    except DifferenceError as error:
        trip.outcome, trip.detail = "differs", str(error)
    except Exception as error:  # what this is there to find
        trip.detail = first_line(error)
        if trip.step in ("build", "dense"):
            trip.outcome = "untried"
    if trip.outcome in ("differs", "failed") and trip.step in ("save", "load", "auto"):
        trip.outcome = trip.outcome if _dense_comes_back(case) else "transformers"
    return trip


def first_line(error: BaseException) -> str:
    """Class and first line of an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def build(case: Case) -> Any:  # noqa: ANN401
    """The tiny model of a case."""
    model_class = getattr(transformers, case.model_class)
    config_class = CONFIG_MAPPING[case.model_type]
    own = getattr(model_class, "config_class", None)
    if own is not None and own in (config_class.sub_configs or {}).values():
        config_class = own  # the text model of a model of texts and pictures
    config = tiny_config(config_class)
    if case.task == "CAUSAL_LM" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True  # an encoder would see the tokens that it predicts
    return tiny_model(model_class, config)


def _dense_comes_back(case: Case) -> bool:
    """Whether transformers saves and loads the dense model of a case, but for rounding."""
    try:
        model = build(case)
        batch = random_batches(model, case.task, 1, seed=1)[0]
        expected = predictions(model, batch)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = _auto_load(case, Path(folder))
        return _difference(predictions(loaded.eval(), batch), expected) <= LOADED
    except Exception:  # of transformers, not ours
        return False


def _travel(case: Case, recipe: str, folder: Path, trip: Trip) -> None:
    model = build(case)
    batches = random_batches(model, case.task, _BATCHES)
    batch = random_batches(model, case.task, 1, seed=1)[0]
    trip.step = "dense"
    dense = predictions(model, batch)
    if not dense.isfinite().all():
        raise ValueError("the dense model's logits are not finite")
    writes = (
        _can_write(model, batch) if case.task in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM") else False
    )
    trip.step = "compress"
    try:
        compress(model, recipe, batches)
    except LowRankError as error:
        trip.outcome, trip.detail = "refused", " ".join(str(error).split())
        if not torch.equal(predictions(model, batch), dense):
            trip.outcome, trip.detail = "differs", f"changed by a refusal: {trip.detail}"
        return
    trip.layers = len(compressed_layers(model)) + len(small_experts(model))
    compressed = predictions(model, batch)
    if torch.equal(compressed, dense):
        trip.outcome, trip.detail = "differs", "the compressed model predicts what the dense does"
        return
    trip.step = "save"
    model.save_pretrained(folder)
    trip.step = "load"
    _compare(trip, compressed, hf_lowrank.load(folder), batch, LOADED)
    trip.step = "auto"
    loaded = _auto_load(case, folder)
    _compare(trip, compressed, loaded, batch, LOADED)
    if writes:
        trip.step = "generate"
        if three_tokens(model, batch) != three_tokens(loaded, batch):
            raise DifferenceError("other tokens are generated")
    trip.step = "merge"
    hf_lowrank.merge(model)
    _compare(trip, compressed, model, batch, MERGED)
    trip.outcome = "ok"


class DifferenceError(Exception):
    """A model that should be the same predicts something else."""


def compress(model: Any, recipe: str, batches: list[dict[str, Any]]) -> None:  # noqa: ANN401
    """One of `RECIPES`, to half of the parameters."""
    if recipe == "plain":
        config = LowRankConfig(param_ratio=0.5, metric="plain")
        hf_lowrank.compress(model, config, progress=False)
    else:
        hf_lowrank.compress(model, LowRankConfig(param_ratio=0.5), batches, progress=False)


def _can_write(model: Any, batch: dict[str, Any]) -> bool:  # noqa: ANN401
    """Whether the dense model generates from tokens alone; some need a picture or a sound."""
    try:
        three_tokens(model, batch)
    except Exception:  # of transformers, not ours
        return False
    return True


def _auto_load(case: Case, folder: Path) -> Any:  # noqa: ANN401
    """The checkpoint by the task's auto class.

    Raises:
        DifferenceError: Tensors are missing or left over.
    """
    model, info = getattr(transformers, TASKS[case.task]).from_pretrained(
        folder, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise DifferenceError(f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:2]}")
    return model


def _compare(
    trip: Trip,
    expected: torch.Tensor,
    model: Any,  # noqa: ANN401
    batch: dict[str, Any],
    allowed: float,
) -> None:
    difference = _difference(predictions(model.eval(), batch), expected)
    trip.differences[trip.step] = difference
    if not difference <= allowed or math.isnan(difference):
        raise DifferenceError(f"by {difference:.1e} of the largest logit")


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)

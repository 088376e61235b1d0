"""What a compression works with beside the config: texts by role, how to work, and its layers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.config import LowRankConfig, option
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.errors import DataError
from hf_lowrank.measuring.batches import checked_batches
from hf_lowrank.measuring.distributed import ALONE, Processes
from hf_lowrank.measuring.embeddings import embedding_loss, with_embeddings
from hf_lowrank.measuring.hooks import GRADIENT_FIELDS
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.measuring.losses import check_losses
from hf_lowrank.measuring.progress import announce
from hf_lowrank.modeling.expert_targets import qualified_experts
from hf_lowrank.modeling.qualification import Qualified, qualified
from hf_lowrank.modeling.targets import refuse_unloaded
from hf_lowrank.value_checks import check_count, check_not_negative


@dataclass(frozen=True)
class Texts:
    """The disjoint sets of batches of a run.

    Attributes:
        calibration: For the moments.
        held_out: For the search of a loss tolerance or of types, and to price cuts.
        evaluation: For the report alone.
        foreign: For the report alone, too: text of a kind that calibration saw nothing of.
    """

    calibration: Sequence[Batch] | None = None
    held_out: Sequence[Batch] | None = None
    evaluation: Sequence[Batch] | None = None
    foreign: Sequence[Batch] | None = None

    @property
    def reported(self) -> dict[str, Sequence[Batch]]:
        """What the report measures, by the name of its field."""
        found = {"evaluation": self.evaluation, "foreign_evaluation": self.foreign}
        return {name: batches for name, batches in found.items() if batches is not None}


@dataclass(frozen=True)
class RunOptions:
    """How a run works, apart from what it decides; the help text of each field says what it does.

    The verbs take these as keywords, and the command line as options (`run_option`).
    """

    loss_function: LossFunction | None = option(
        None, "Loss of a batch. Default: the model's own task loss."
    )
    cache_dir: str | Path | None = option(
        None,
        "Folder for moments and spectra, so that a killed or repeated run goes on from there; "
        "training is done again.",
    )
    moment_gib: float = option(
        8.0, "Memory for moments, GiB; more layers take more passes over the data."
    )
    recover_steps: int = option(
        0,
        "Steps of training the factors after the cut, towards the dense model (of an encoder its "
        "embeddings); with several stages of all of them together.",
    )
    recover: str | None = option(
        None,
        "What these steps train: factors or lora (adapters on the factors, merged into them "
        "afterwards; needs peft). Default: factors.",
    )
    stages: int = option(
        1,
        "Cuts in which a param_ratio is reached, with a part of recover_steps after each, towards "
        "the dense model, and new moments before the next.",
    )
    speed: bool = option(
        False,
        "Time the dense and the compressed model in turn, for the report: a language model on "
        "prompts read at once, then token by token; an encoder on 1 and 32 sentences of 32 and 128 "
        "tokens.",
    )
    progress: bool = option(True, "Show progress.")

    def __post_init__(self) -> None:
        """Refuses what no run could do.

        Raises:
            ConfigError: With the setting.
        """
        check_count("recover_steps", self.recover_steps, 0)
        check_not_negative("moment_gib", self.moment_gib)


def run_option(name: str, **overrides: Any) -> Any:  # noqa: ANN401
    """A dataclass field with the default and the help text of a `RunOptions` field."""
    (source,) = (each for each in dataclasses.fields(RunOptions) if each.name == name)
    settings: dict[str, Any] = {"default": source.default, "metadata": source.metadata}
    return dataclasses.field(**settings | overrides)


class Stopwatch:
    """Adds up seconds by phase.

    Args:
        seconds: What was spent before, by phase.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the block towards a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Run:
    """What `analyze`, `decide` and `apply_` are all given.

    Attributes:
        texts: Text by role.
        options: How to work.
        stopwatch: Where the seconds of each phase are added up.
        processes: Those that share the work.
        experts: Fused experts that may be made smaller: their router, or None, by name.
    """

    texts: Texts = Texts()
    options: RunOptions = RunOptions()
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    processes: Processes = ALONE
    experts: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def progress(self) -> bool:
        """Whether this process shows progress."""
        return self.options.progress and self.processes.is_main


def read_texts(
    model: nn.Module, loss_function: LossFunction | None, **sets: Iterable[Batch] | None
) -> Texts:
    """Reads each set of batches once and checks it; see `checked_batches`.

    Args:
        model: The model that will read them.
        loss_function: Loss of the run, None for the model's own.
        **sets: Batches by their role in `Texts`.

    Raises:
        ConfigError: The model's own loss is not known.
        DataError: With the set and the batch, or labels are missing.
        TargetError: The model was never loaded, or all of it is offloaded.
    """
    refuse_unloaded(model)
    embedding = embedding_loss(model, loss_function)
    own_loss = loss_function is None or embedding is not None
    found = {
        role: checked_batches(batches, role, model, own_loss=own_loss)
        for role, batches in sets.items()
        if batches is not None
    }
    for role in ("held_out", "evaluation", "foreign"):
        if own_loss and embedding is None and found.get(role):
            check_losses(model, found[role][0])
    return Texts(**found)


def split_texts(config: LowRankConfig, texts: Texts, recover_steps: int = 0) -> Texts:
    """Takes held-out batches off the calibration batches where a search or a recovery needs them.

    Raises:
        DataError: They are needed and there is too little calibration data.
    """
    searches = config.searches and config.ranks is None
    is_needed = searches or recover_steps > 0
    if not is_needed or texts.held_out is not None:
        return texts
    batches = list(texts.calibration or [])
    if len(batches) < 2:
        raise DataError(
            f"Got {len(batches)} calibration batches and no held_out. A loss tolerance is tested, "
            "types of weights are tried, cuts are priced, and a recovery is judged on held-out "
            "text: pass at least two calibration batches, or held_out, or set param_ratio, no "
            "measured_prices and no recover_steps."
        )
    size = max(1, len(batches) // 4)
    return dataclasses.replace(texts, calibration=batches[:-size], held_out=batches[-size:])


def with_dense_embeddings(
    model: nn.Module, texts: Texts, loss_function: LossFunction | None
) -> Texts:
    """Where embeddings are to be kept: the dense model's as labels of what they are judged on.

    Args:
        model: The dense model.
        texts: As `split_texts` leaves them.
        loss_function: Loss of the run, None for the model's own.

    Raises:
        ConfigError, DataError: See `EmbeddingLoss`.
    """
    loss = embedding_loss(model, loss_function)
    if loss is None:
        return texts
    judged = {
        name: with_embeddings(model, batches, loss)
        for name in ("held_out", "evaluation", "foreign")
        if (batches := getattr(texts, name)) is not None
    }
    return dataclasses.replace(texts, **judged)


def run_targets(
    model: nn.Module, config: LowRankConfig, run: Run, *, with_gradients: bool = False
) -> Qualified:
    """The layers that can be factorized, and why others that were asked for stay dense.

    Args:
        model: The dense model.
        config: Names the layers; its metric says whether a gradient must reach them.
        run: Its first batch is tried, of the calibration text where there is one.
        with_gradients: Whether gradients are read whatever the metric.

    Raises:
        TargetError, ConfigError, DataError, NumericalError: See `qualified`.
    """
    texts = (run.texts.calibration, run.texts.held_out, run.texts.evaluation)
    if run.progress:
        announce("try the layers on the first batch")
    return qualified(
        model,
        config,
        next((batches[0] for batches in texts if batches), None),
        needs_gradient=with_gradients or bool(METRICS[config.metric].needs & GRADIENT_FIELDS),
        loss_function=run.options.loss_function,
        processes=run.processes,
    )


def with_experts(model: nn.Module, config: LowRankConfig, run: Run) -> tuple[Run, dict[str, str]]:
    """The run with the fused experts that may be made smaller, and why others may not.

    Several stages leave them alone: training between the cuts does not reach them.
    """
    batch = next(iter(run.texts.calibration or []), None) if run.options.stages == 1 else None
    found = qualified_experts(
        model,
        config,
        batch,
        loss_function=run.options.loss_function,
        processes=run.processes,
    )
    return dataclasses.replace(run, experts=found.routers), found.left_dense

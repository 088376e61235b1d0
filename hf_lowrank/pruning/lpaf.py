"""LPAF in one call: prune while fine-tuning, factorize, fine-tune with mixed rank.

Low-Rank Prune-And-Factorize (Ren and Zhu 2023, arXiv 2306.14152; docs/methods.md, section 4).
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainingArguments

from hf_lowrank.compression.goals import check_goal
from hf_lowrank.compression.options import Texts, read_texts
from hf_lowrank.compression.verbs import compress
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.measuring.items import Batch
from hf_lowrank.modeling.qualification import qualified
from hf_lowrank.pruning.lpaf_report import (
    Cut,
    Factorized,
    FineTuned,
    LpafReport,
    Overheads,
    Pruned,
    TargetSizes,
)
from hf_lowrank.pruning.mixed_trainer import MixedRankTrainer
from hf_lowrank.pruning.pruned_ranks import NumericalRanks, mean_ranks
from hf_lowrank.pruning.pruning_arguments import MixedRankArguments, PruningArguments
from hf_lowrank.pruning.pruning_trainer import PruningTrainer
from hf_lowrank.pruning.stage_store import StageStore, digest_of, factorize_empty_
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.reading import read_section
from hf_lowrank.training.best import BestWeights
from hf_lowrank.training.distillation import check_teacher

STAGES = (Pruned.STAGE, Factorized.STAGE, FineTuned.STAGE)
Record = TypeVar("Record", Pruned, Factorized, FineTuned)


@dataclass(frozen=True)
class LpafSettings:
    """What each stage does.

    Attributes:
        compression: Goal, metric, rule and targets. Metric "sparsity" is the paper's; "plain"
            leaves its sparsity-aware SVD out; "kfac" reads moments of the pruned model.
        prune: False leaves the first stage out: the given weights are factorized as they are.
        mixed_rank: False leaves the sparse matrices out of the last stage: plain fine-tuning.
        pruning: Fields of `PruningArguments` for the first stage; `max_steps` or
            `num_train_epochs`, and `learning_rate` among them.
        fine_tuning: Fields of `MixedRankArguments` for the last stage, likewise.
            `num_train_epochs` 0 without `max_steps` leaves the stage out.
        training: Fields of `DistillationArguments` for both.
    """

    compression: LowRankConfig = field(
        default_factory=lambda: LowRankConfig(param_ratio=0.25, metric="sparsity")
    )
    prune: bool = True
    mixed_rank: bool = True
    pruning: Mapping[str, Any] = field(default_factory=dict)
    fine_tuning: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the form, which is that of two factors."""
        if self.compression.form == "compact":
            raise ConfigError(
                "LPAF trains two factors beside a sparse matrix; leave form out, or set it to "
                "'factors'."
            )
        object.__setattr__(self, "compression", self.compression.replace(form="factors"))


def lpaf_(
    model: nn.Module,
    train_dataset: Any,  # noqa: ANN401
    collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    settings: LpafSettings | None = None,
    *,
    calibration: Iterable[Batch] | None = None,
    held_out: Iterable[Batch] | None = None,
    eval_dataset: Any = None,  # noqa: ANN401
    teacher: nn.Module | None = None,
    work_dir: str | Path | None = None,
    on_stage: Callable[[str, nn.Module], bool | None] | None = None,
) -> LpafReport:
    """Runs the three stages on a model, in place, and leaves it in eval mode.

    With a work folder each finished stage is kept under a hash of everything that it depends on
    (starting weights, data, settings), so a killed run goes on after its last finished stage, and
    runs that differ in a later stage share the earlier ones.

    Args:
        model: Transformers model with its task head; dense, fine-tuned or not.
        train_dataset: Tokenized examples.
        collator: Makes a batch of them.
        settings: What each stage does.
        calibration: Batches for the metrics that need moments, as in `compress`.
        held_out: Batches for a loss tolerance, which is measured from the pruned model.
        eval_dataset: Examples on which the last stage keeps its best epoch, the start included.
        teacher: Dense fine-tuned model, where `distillation_weight` is set; another object than
            the model.
        work_dir: Where finished stages are kept.
        on_stage: Called with a stage's name and the model after each stage. Where it returns
            False after the pruning, that was too much: the model is left pruned, and dense.

    Returns:
        What the stages did.

    Raises:
        ConfigError, DataError, TargetError: Before anything is changed.
    """
    run = _Run(model, settings or LpafSettings(), StageStore(Path(work_dir) if work_dir else None))
    texts = read_texts(model, None, calibration=calibration, held_out=held_out)
    run.check(texts, teacher)
    run.make_keys(train_dataset, texts, eval_dataset, teacher)
    tell = on_stage or (lambda stage, model: None)
    run.prune(train_dataset, collator, teacher)
    if tell(STAGES[0], model) is not False:
        run.factorize(texts)
        tell(STAGES[1], model)
        run.fine_tune(train_dataset, collator, eval_dataset, teacher)
        tell(STAGES[2], model.eval())
    model.eval()
    return run.report()


class _Run:
    """One run: the model in its present stage, and the records of the finished ones."""

    def __init__(self, model: nn.Module, settings: LpafSettings, store: StageStore) -> None:
        self.model = model
        self.settings = settings
        self.store = store
        self.targets = qualified(model, settings.compression).targets
        self.shapes = {name: linear_shape(layer) for name, layer in self.targets.items()}
        self.pruned: Pruned | None = None
        self.factorized: Factorized | None = None
        self.tuned: FineTuned | None = None
        self.restored: list[str] = []
        self.keys: dict[str, str] = {}

    def check(self, texts: Texts, teacher: nn.Module | None) -> None:
        """Refuses what would fail in a later stage, hours from now."""
        settings, config = self.settings, self.settings.compression
        check_goal(self.targets, config)
        if config.channels:
            raise ConfigError("LPAF takes no channels out; leave channels out of its config.")
        needs_data = bool(METRICS[config.metric].needs) or config.goal == "loss_tolerance"
        if needs_data and not texts.calibration:
            raise DataError(
                f"metric {config.metric!r} with goal {config.goal} needs calibration batches."
            )
        with tempfile.TemporaryDirectory() as folder:
            pruning = PruningArguments(**self._arguments(folder, settings.pruning))
            tuning = MixedRankArguments(**self._arguments(folder, settings.fine_tuning))
        if settings.prune and not _trains(pruning):
            raise ConfigError("The pruning stage needs max_steps or num_train_epochs > 0.")
        for arguments in (pruning, tuning):
            check_teacher(self.model, arguments, teacher)

    def make_keys(
        self,
        train: Any,  # noqa: ANN401
        texts: Texts,
        tuning: Any,  # noqa: ANN401
        teacher: nn.Module | None,
    ) -> None:
        """Hashes of what each stage depends on; nothing is hashed where nothing is kept."""
        if self.store.folder is None:
            self.keys = dict.fromkeys(STAGES, "")
            return
        settings = self.settings
        start = (self.model, train, teacher)
        pruned = digest_of(*start, settings.training, settings.prune, settings.pruning)
        config = settings.compression.to_dict()
        factorized = digest_of(pruned, config, texts.calibration, texts.held_out)
        tuned = digest_of(factorized, settings.mixed_rank, settings.fine_tuning, tuning)
        self.keys = dict(zip(STAGES, (pruned, factorized, tuned), strict=True))

    def prune(self, dataset: Any, collator: Any, teacher: nn.Module | None) -> None:  # noqa: ANN401
        """Stage 1: fine-tunes the dense model and prunes it."""
        self.pruned = self._restored(Pruned)
        if self.pruned is not None:
            return
        start, overhead = time.perf_counter(), None
        if self.settings.prune:
            with tempfile.TemporaryDirectory() as folder:
                trainer = PruningTrainer(
                    self.model,
                    PruningArguments(**self._arguments(folder, self.settings.pruning)),
                    lowrank_config=self.settings.compression,
                    teacher=teacher,
                    train_dataset=dataset,
                    data_collator=collator,
                )
                trainer.train()
                overhead = trainer.overhead()
                # Trainer leaves its autocast on the model; scores and moments are without.
                extract_model_from_parallel(self.model, keep_fp32_wrapper=False)
        seconds = time.perf_counter() - start
        ranks = mean_ranks({name: linear_weight(layer) for name, layer in self.targets.items()})
        self.pruned = self._kept(Pruned(seconds, NumericalRanks.of(ranks), overhead))

    def factorize(self, texts: Texts) -> None:
        """Stage 2: replaces what survived by factors."""
        self.factorized = self._restored(Factorized)
        if self.factorized is not None:
            return
        start = time.perf_counter()
        config = copy.deepcopy(self.settings.compression)
        found = compress(
            self.model, config, texts.calibration, held_out=texts.held_out, progress=False
        )
        self.factorized = self._kept(
            Factorized(
                seconds=time.perf_counter() - start,
                ranks=found.ranks,
                compression_seconds=found.seconds,
                predicted_loss_difference=found.predicted_loss_difference,
                failures=found.failures,
                held_out=found.held_out,
            )
        )

    def fine_tune(
        self,
        dataset: Any,  # noqa: ANN401
        collator: Any,  # noqa: ANN401
        eval_dataset: Any,  # noqa: ANN401
        teacher: nn.Module | None,
    ) -> None:
        """Stage 3: leads the model from the sparse matrices over to the factors."""
        self.tuned = self._restored(FineTuned)
        if self.tuned is not None:
            return
        changes = {} if eval_dataset is None else {"eval_strategy": "epoch", "eval_on_start": True}
        start, overhead, best = time.perf_counter(), None, None
        with tempfile.TemporaryDirectory() as folder:
            values = self._arguments(folder, self.settings.fine_tuning) | changes
            arguments = MixedRankArguments(**values)
            if _trains(arguments):
                trainer = MixedRankTrainer(
                    self.model,
                    arguments,
                    sparse_layers=self._sparse_layers() if self.settings.mixed_rank else None,
                    teacher=teacher,
                    train_dataset=dataset,
                    eval_dataset=eval_dataset,
                    data_collator=collator,
                )
                best = BestWeights(self.model)
                trainer.add_callback(best)
                trainer.train()
                best.restore_()
                overhead = trainer.overhead()
        held_out_loss = None if best is None or eval_dataset is None else best.best_loss
        self.tuned = self._kept(FineTuned(time.perf_counter() - start, overhead, held_out_loss))

    def report(self) -> LpafReport:
        """Everything that the stages recorded."""
        assert self.pruned is not None  # the first stage has run
        ranks, settings = self.pruned.numerical_ranks, self.settings
        finished = [each for each in (self.pruned, self.factorized, self.tuned) if each]
        found = LpafReport(
            settings=asdict(settings) | {"compression": settings.compression.to_dict()},
            density=ranks.density,
            numerical_ranks=ranks,
            overheads=Overheads(self.pruned.overhead),
            seconds={each.STAGE: each.seconds for each in finished},
            restored=self.restored,
        )
        if self.factorized is None or self.tuned is None:
            return found
        plan = RankPlan(self.factorized.ranks, self.shapes)
        return replace(
            found,
            overheads=Overheads(self.pruned.overhead, self.tuned.overhead),
            ranks=self.factorized.ranks,
            parameters=TargetSizes(plan.dense_parameters, plan.kept_parameters),
            compression=Cut(*(getattr(self.factorized, each.name) for each in fields(Cut))),
            held_out_loss=self.tuned.held_out_loss,
        )

    def _arguments(self, folder: str, stage: Mapping[str, Any]) -> dict[str, Any]:
        own = {
            "output_dir": folder,
            "save_strategy": "no",
            "eval_strategy": "no",  # the last stage turns it on where there are examples for it
            "report_to": [],
        }
        return {**self.settings.training, **stage, **own}

    def _sparse_layers(self) -> dict[str, nn.Module]:
        return {name: self.targets[name] for name in factorized_layers(self.model)}

    def _restored(self, kind: type[Record]) -> Record | None:
        """The record of a stage that an earlier run has finished, its weights in the model."""
        stage, key = kind.STAGE, self.keys[kind.STAGE]
        values = self.store.read(stage, key)
        if values is None:
            return None
        record = read_section(kind, values, stage)
        if isinstance(record, Factorized):
            config = self.settings.compression.replace(ranks=record.ranks, form="factors")
            factorize_empty_(self.model, config)
        self.store.load_(stage, key, self.model)
        self.restored.append(stage)
        return record

    def _kept(self, record: Record) -> Record:
        self.store.write(record.STAGE, self.keys[record.STAGE], self.model, asdict(record))
        return record


def _trains(args: TrainingArguments) -> bool:
    return args.max_steps > 0 or args.num_train_epochs > 0

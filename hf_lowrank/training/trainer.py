"""`LowRankTrainer`: SVD training with ranks chosen by the loss while the model trains."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import MetricSettings
from hf_lowrank.errors import ConfigError, DataError, in_layer
from hf_lowrank.evaluation.perplexity import ItemLoss, LossMeasurement, measure_loss
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.measuring.losses import check_losses
from hf_lowrank.modeling.marks import attach_config_
from hf_lowrank.ranks.plan import RankPlan, useful_rank
from hf_lowrank.ranks.threshold import check_budget
from hf_lowrank.report.reading import read_section
from hf_lowrank.report.training_sections import RankSelection, Training
from hf_lowrank.training.form_changes import (
    current_ranks,
    reshape_,
    to_inference_form_,
    to_training_form_,
)
from hf_lowrank.training.objective import ObjectiveTrainer, objective_of, teacher_for
from hf_lowrank.training.penalties import orthogonality_penalty, rank_penalty
from hf_lowrank.training.selection import Selection, SelectionSettings, select_ranks
from hf_lowrank.training.selection_schedule import SelectionSchedule, scheduled_ratio
from hf_lowrank.training.training_arguments import LowRankTrainingArguments, check_lowrank_config
from hf_lowrank.training.truncation import cut_factors, make_dense_, truncate_

STATE_FILE = "lowrank_state.json"


class LowRankTrainer(ObjectiveTrainer):
    """Trains `L_T + lambda_O L_O + lambda_R L_R` and cuts ranks at the end of every epoch.

    The target layers are turned into `U diag(s) V` at full rank (or the ranks of the config's
    `rank_pattern`) when the trainer is made. Everything else is `Trainer`: checkpoints, resuming,
    evaluation, gradient accumulation, mixed precision and DDP.

    Args:
        model: Dense or compressed transformers model; changed in place.
        args: See `LowRankTrainingArguments`.
        lowrank_config: Target layers, fixed ranks and, for rule `price`, the damping; for a
            compressed model its own config, or none.
        loss_function: Loss of a batch, item by item, to train and to select ranks by. None: the
            model's own, and for a model without a head `EmbeddingLoss()`: it is trained towards the
            embeddings that it gave when it was dense, or towards those that its training set has as
            labels. With `compute_loss_func` a head's ranks are selected by the head's own loss.
        teacher: The dense model for an `EmbeddingLoss`; None: a copy of `model` as it is now.
        **kwargs: As for `Trainer`.

    Attributes:
        selections: What every selection so far did: epoch, probes, ranks, seconds.

    Raises:
        ConfigError: The arguments are of the wrong class, or `lowrank_config` holds a setting that
            training does not read; or the loss and the teacher do not fit, see `teacher_for`.
        DataError: There is no training set to select ranks on.
        TargetError: The model's weights are quantized.
    """

    args: LowRankTrainingArguments
    advice: ClassVar[str] = "Lower the learning rate or the penalties' weights."

    def __init__(
        self,
        model: nn.Module,
        args: LowRankTrainingArguments,
        *,
        lowrank_config: LowRankConfig | None = None,
        loss_function: LossFunction | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LowRankTrainingArguments):
            raise ConfigError(
                f"LowRankTrainer needs LowRankTrainingArguments, got {type(args).__name__}."
            )
        rows = kwargs.get("train_dataset")
        if not rows:
            raise DataError("LowRankTrainer needs a train_dataset: ranks are selected on it.")
        if not hasattr(rows, "__len__"):
            kind = type(rows).__name__
            raise DataError(f"Ranks are selected on part of train_dataset; {kind} has no length.")
        self.lowrank_config = config = lowrank_config or LowRankConfig()
        self.export_form = config.inference_form
        check_lowrank_config(config, args, is_compressed=bool(factorized_layers(model)))
        self._damping = MetricSettings(
            config.input_damping, config.output_damping, config.activation_alpha
        )
        loss_function = objective_of(model, loss_function, kwargs.get("compute_loss_func"))
        teacher = teacher_for(model, loss_function, teacher, rows)  # before the layers change
        layers = to_training_form_(model, self.lowrank_config)
        self.lowrank_shapes = {name: linear_shape(layer) for name, layer in layers.items()}
        self.selections: list[RankSelection] = []
        self.reference: list[ItemLoss] | None = None
        self._terms: dict[str, list[float]] = {}
        self._pending: dict[str, float] = {}
        kwargs |= {"loss_function": loss_function, "teacher": teacher}
        super().__init__(model=model, args=args, **kwargs)
        self._describe_ranks()
        self._check_target()
        self.add_callback(SelectionSchedule(self.select_ranks, self._measure_start))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """The task loss, in training plus the two penalties; each is logged apart."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            layers = list(factorized_layers(self.model).values())
            orthogonality = orthogonality_penalty(layers).to(loss.device)
            rank = rank_penalty(layers, self.args.rank_penalty).to(loss.device)
            share = self.penalty_share(num_items_in_batch)
            for name, value in (
                ("loss_task", loss.detach() / share),
                ("loss_orthogonality", orthogonality.detach()),
                ("loss_rank", rank.detach()),
            ):
                self._terms.setdefault(name, []).append(float(value))
            loss = loss + share * (
                self.args.orthogonality_weight * orthogonality
                + self.args.rank_penalty_weight * rank
            )
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One step on the wrapper in force: DDP is renewed after a cut."""
        return super().training_step(self.model_wrapped, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss term since the last log."""
        if "loss" in logs:
            logs |= {name: sum(v) / len(v) for name, v in self._terms.items() if v}
            logs |= self._pending
            self._terms, self._pending = {}, {}
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in Trainer, but spectra do not decay: their size is the rank penalty's business."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith("lowrank_s")]

    def select_ranks(self) -> Selection | None:
        """Selects ranks once and cuts the layers; called at every epoch's end.

        The main process decides, the others follow. None if no layer is factorized any more, or
        the size that is due is reached.
        """
        batches = self.selection_batches()
        layers = {n: m for n, m in factorized_layers(self.model).items() if m.lowrank_s is not None}
        scheduled = scheduled_ratio(self.args, self.state)
        if not layers or (scheduled is not None and self.param_ratio() <= scheduled):
            return None
        args = self.args
        settings = SelectionSettings(
            rule=args.selection_rule,
            tolerance=args.selection_tolerance,
            precision=args.selection_precision,
            smallest_ratio=args.smallest_ratio,
            param_ratio=scheduled,
            label_source=args.selection_labels,
            seed=args.seed,
            damping=self._damping,
            dense_shapes={n: s for n, s in self.lowrank_shapes.items() if n not in layers},
            form=self.export_form,
            loss_function=self.measured,
        )
        start = time.perf_counter()
        now, reference = None, []
        if scheduled is None:  # a size is cut to whatever the loss is
            now = self._measure(batches)
            reference = self._update_reference(now)
        decided: list[Any] = [None]
        if self.accelerator.is_main_process:
            decided[0] = select_ranks(self.model, layers, batches, reference, settings)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(decided)
        selection: Selection = decided[0]
        self._apply(selection, layers)
        found = RankSelection(
            step=self.state.global_step,
            epoch=self.state.epoch,
            probes=list(selection.probes),
            ranks=current_ranks(self.model, self.lowrank_shapes),
            param_ratio=self.param_ratio(),
            loss_before=None if now is None else now.mean,
            loss_passes=selection.loss_passes + (now is not None),
            decompositions=selection.decompositions,
            seconds=time.perf_counter() - start,
        )
        self.selections.append(found)
        # Not logged here: Trainer takes a log during a callback for the one that is due.
        self._pending = {"param_ratio": self.param_ratio(), "selection_seconds": found.seconds}
        return selection

    def param_ratio(self) -> float:
        """Kept / dense parameters as exported; a layer at or above break-even counts as dense."""
        shapes, form = self.lowrank_shapes, self.export_form
        ranks = current_ranks(self.model, shapes)
        useful = {
            name: None if rank is None else useful_rank(shapes[name], rank, form)
            for name, rank in ranks.items()
        }
        return RankPlan(useful, shapes, form=form).param_ratio

    def summary(self) -> Training:
        """How the training went, for the report."""
        return Training(
            epochs=self.args.num_train_epochs,
            learning_rate=self.args.learning_rate,
            rule=self.args.selection_rule,
            selections=len(self.selections),
            param_ratio=self.args.target_param_ratio,
            tolerance=self.args.selection_tolerance,
        )

    def _check_target(self) -> None:
        target = self.args.target_param_ratio
        if target is not None:
            check_budget(self.lowrank_shapes, target, form=self.export_form)

    def selection_batches(self) -> list[Batch]:
        """The subset of the training set that selections are measured on."""
        return self.fixed_batches("selection", self.args.selection_samples)

    def export(self) -> nn.Module:
        """Folds the spectra into the stored form, in place; the model is then ready to ship."""
        to_inference_form_(self.model, self.export_form)
        self._describe_ranks(form=self.export_form)
        return self.model

    def _apply(self, selection: Selection, layers: dict[str, LowRankLinear]) -> None:
        changed = False
        self._drop_wrapper()
        for name, layer in layers.items():
            rank = selection.plan.ranks[name]
            if rank is not None and rank < layer.rank:
                with in_layer(name, self.advice):
                    truncate_(layer, cut_factors(selection.factors[name], rank), self._optimizer())
                changed = True
            elif rank is None and self.args.break_even == "dense":
                make_dense_(self.model, name, layer, self._optimizer())
                changed = True
        if changed:
            self._describe_ranks()
        self._renew_wrapper()

    def _load_best_model(self) -> None:
        """Gives the layers the best checkpoint's ranks before its weights are read."""
        self._reshape_like(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _reshape_like(self, checkpoint: Path) -> None:
        """Gives every layer the rank that it has in a checkpoint; the factors come later."""
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        reshape_(self.model, config.get("quantization_config", {}).get("ranks", {}))
        self._describe_ranks()

    def _optimizer(self) -> torch.optim.Optimizer | None:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _drop_wrapper(self) -> None:
        """Frees DDP's reducer, which holds on to gradients of the old shapes."""
        if self.model_wrapped is not self.model and self.accelerator.num_processes > 1:
            wrapper = cast(Any, self.model_wrapped)
            wrapper.reducer = wrapper.logger = None

    def _renew_wrapper(self) -> None:
        """DDP sorts gradients into buckets of fixed sizes, so it has to be made anew."""
        if self.model_wrapped is self.model or self.accelerator.num_processes == 1:
            return
        models = self.accelerator._models
        models[:] = [model for model in models if model is not self.model_wrapped]
        self.model_wrapped = self.accelerator.prepare_model(self.model)

    def _describe_ranks(self, form: str = "usv") -> None:
        ranks = current_ranks(self.model, self.lowrank_shapes)
        attach_config_(self.model, self.lowrank_config.replace(ranks=ranks, form=form))

    def _measure(self, batches: Sequence[Batch]) -> LossMeasurement:
        return measure_loss(self.model, batches, loss_function=self.measured)

    def _measure_start(self) -> None:
        """Measures the model before training, where `tolerance_reference` refers to it."""
        batches = self.selection_batches()  # refused now, not after the first epoch
        if self.args.target_param_ratio is None or self.args.selection_rule == "price":
            check_losses(self.model, batches[0], self.measured)
        refers = self.args.tolerance_reference != "current"
        if self.reference is None and refers and self.args.target_param_ratio is None:
            self.reference = list(self._measure(batches).items)

    def _update_reference(self, now: LossMeasurement) -> list[ItemLoss]:
        """The losses that the tolerance is measured from; see `tolerance_reference`."""
        kind = self.args.tolerance_reference
        if (
            self.reference is None
            or kind == "current"
            or (kind == "best" and now.mean < LossMeasurement(tuple(self.reference)).mean)
        ):
            self.reference = list(now.items)
        return self.reference

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Writes the state of the selection beside the weights."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every process comes here, one writes
            return
        folder = Path(output_dir or str(self.args.output_dir))
        state = {"reference": self.reference, "selections": [asdict(s) for s in self.selections]}
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Gives the layers the checkpoint's ranks before its weights are read."""
        state_file = Path(resume_from_checkpoint) / STATE_FILE
        self._reshape_like(state_file.parent)
        if state_file.is_file():
            state = json.loads(state_file.read_text("utf-8"))
            self.reference = (items := state["reference"]) and [(a, b) for a, b in items]
            found = state["selections"]
            self.selections = [read_section(RankSelection, each, STATE_FILE) for each in found]
        self._describe_ranks()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

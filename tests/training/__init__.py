"""Tiny training runs: data sets of a few rows, and trainers that train for a second."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_lowrank.decomposition.thin import thin_svd
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.training.trainer import LowRankTrainer
from hf_lowrank.training.training_arguments import LowRankTrainingArguments
from tests.tiny_models import (
    Batch,
    logits,
    sentence_batches,
    tiny_bert_classifier,
    tiny_llama,
    written_batches,
)

Rows = list[dict[str, torch.Tensor]]
# What `LowRankTrainer` takes beside its arguments.
EXTRA = ("lowrank_config", "callbacks", "eval_dataset", "compute_loss_func")
EXTRA += ("loss_function", "teacher")
# Renamed in the course of transformers 5.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"


def rows_of(batches: Sequence[Batch]) -> Rows:
    """The batches' examples one by one, as a data set."""
    return [
        {name: tensor[i] for name, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]


def sentence_rows(size: int = 16, seed: int = 0) -> Rows:
    """Sentences with some padding, labelled by the model itself, so that damage raises its loss."""
    model = tiny_bert_classifier()
    batches = [
        {**batch, "labels": logits(model, {**batch, "labels": None}).argmax(dim=-1)}
        for batch in sentence_batches(size // 4, seed=seed)
    ]
    return rows_of(batches)


def text_rows(size: int = 16, seed: int = 0) -> Rows:
    """Text that a tiny Llama wrote, every other sequence shortened by padding."""
    rows = rows_of(written_batches(tiny_llama(), 1, size, seed=seed))
    for row in rows[::2]:
        row["input_ids"], row["attention_mask"] = (
            row["input_ids"].clone(),
            row["attention_mask"].clone(),
        )
        row["input_ids"][-6:], row["attention_mask"][-6:] = 0, 0
    for row in rows:
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    return rows


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two epochs of four steps on 16 rows, on the CPU."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def arguments(folder: Path, **changes: Any) -> LowRankTrainingArguments:
    """The same for `LowRankTrainer`, by the rule that needs no moments unless another is given."""
    return LowRankTrainingArguments(
        **({"selection_rule": "relative"} | settings(folder, **changes))
    )


def trainer_for(model: nn.Module, rows: Rows, folder: Path, **changes: Any) -> LowRankTrainer:
    """A trainer with the arguments of `arguments`; what is in `EXTRA` passes on."""
    extra = {name: changes.pop(name) for name in EXTRA if name in changes}
    return LowRankTrainer(model, arguments(folder, **changes), train_dataset=rows, **extra)


def training_layer(
    out_features: int = 8, in_features: int = 6, rank: int = 6, seed: int = 0, bias: bool = True
) -> LowRankLinear:
    """A layer `U diag(s) V` with orthonormal factors and a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    layer = LowRankLinear(in_features, out_features, rank, bias=bias, form="usv")
    left = torch.randn(out_features, rank, generator=generator)
    right = torch.randn(rank, in_features, generator=generator)
    U, s, V = thin_svd(left, right)
    with torch.no_grad():
        layer.lowrank_B.weight.copy_(U)
        layer.lowrank_A.weight.copy_(V)
        layer.lowrank_s.copy_(s)
        if bias:
            layer.lowrank_B.bias.copy_(torch.randn(out_features, generator=generator))
    return layer


def kept_ratio(model: nn.Module, shapes: dict[str, tuple[int, int]]) -> float:
    """Parameters of the named layers now, as a share of the dense ones, counted one by one."""
    kept = 0
    for name in shapes:
        layer = model.get_submodule(name)
        kept += sum(p.numel() for n, p in layer.named_parameters() if not n.endswith("bias"))
    return kept / sum(rows * columns for rows, columns in shapes.values())


def target_shapes(trainer: LowRankTrainer) -> dict[str, tuple[int, int]]:
    return {n: linear_shape(trainer.model.get_submodule(n)) for n in list(trainer.lowrank_shapes)}


def selection_logs(trainer: LowRankTrainer) -> list[float]:
    return [log["param_ratio"] for log in trainer.state.log_history if "param_ratio" in log]


class StopAt(TrainerCallback):
    """Ends a run after a step, as a kill would, but before the epoch's end is reached."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


class PoisonAt(TrainerCallback):
    """Puts a NaN into the model before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            with torch.no_grad():
                kwargs["model"].classifier.weight[0, 0] = math.nan


def run_to_the_end(folder: Path, **changes: Any) -> LowRankTrainer:
    trainer = trainer_for(tiny_bert_classifier(), sentence_rows(), folder, **changes)
    trainer.train()
    return trainer

"""A teacher and a student made from one config object: the teacher stays what it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from transformers import default_data_collator as collator

from hf_lowrank import LowRankConfig
from hf_lowrank.pruning.lpaf import LpafSettings, lpaf_
from tests.tiny_models import build, logits, sentence_batches, tiny_bert_classifier
from tests.training import sentence_rows, settings, trainer_for


def train(student: Any, folder: Path) -> None:
    trainer = trainer_for(
        student, sentence_rows(), folder, target_param_ratio=0.5, num_train_epochs=1
    )
    trainer.train()
    trainer.export()


def prune(student: Any, folder: Path) -> None:
    common = settings(folder, num_train_epochs=1)
    for name in ("output_dir", "save_strategy", "report_to"):
        del common[name]
    lpaf_(
        student,
        sentence_rows(),
        collator,
        LpafSettings(LowRankConfig(param_ratio=0.4, metric="sparsity"), training=common),
    )


@pytest.mark.parametrize("method", [train, prune])
def test_a_trained_student_leaves_the_teacher_dense(
    tmp_path: Path, method: Callable[[Any, Path], None]
):
    teacher = tiny_bert_classifier()
    student = build(BertForSequenceClassification, teacher.config, 0)
    assert student.config is teacher.config
    (batch,) = sentence_batches(1)
    before = logits(teacher, batch)
    method(student, tmp_path / "run")
    assert student.config.quantization_config is not None
    teacher.save_pretrained(tmp_path / "teacher")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    assert torch.equal(logits(again, batch), before)
    assert sorted(path.name for path in (tmp_path / "teacher").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]

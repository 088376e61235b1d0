"""`scripts/train_llm.py` on a tiny Llama: trains, cuts, saves, resumes, refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowrank
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.training.trainer import LowRankTrainer
from tests.scripts import Finished, InProcess, Inputs


@pytest.fixture
def run(inputs: Inputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    script = InProcess("train_llm", monkeypatch, capsys)

    def start(**changes: object) -> Finished:
        given = {
            "model": inputs.model,
            "train": inputs.calibration,
            "evaluation": inputs.evaluation,
            "train_sequences": 16,
            "evaluation_sequences": 8,
            "sequence_length": 32,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-4,
            "save_strategy": "epoch",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
        return script(*(part for n, v in given.items() if v is not None for part in (f"--{n}", v)))

    return start


def test_a_run_leaves_a_smaller_model_and_its_report(run: Any, broken: Path, tmp_path: Path):
    output = tmp_path / "out"
    (broken / "processor_config.json").write_text('{"size": 224}', "utf-8")
    done = run(model=broken, output_dir=output, target_param_ratio=0.5)
    assert done.code == 0, done.err
    assert f"saved to {output / 'final'}\n" in done.out
    assert (output / "final" / "processor_config.json").read_text("utf-8") == '{"size": 224}'
    report = json.loads((output / "final" / "report.json").read_text("utf-8"))
    kept, dense = (report["parameters"][f"targeted_{name}"] for name in ("kept", "dense"))
    assert 0.45 * dense < kept <= 0.5 * dense
    assert report["evaluation"]["tokens"] == 8 * 31
    first = report["data"]["selections"][0]
    assert (first["loss_passes"], first["decompositions"]) == (1, len(report["ranks"]))
    model = hf_lowrank.load(output / "final")
    found = {name: layer.rank for name, layer in factorized_layers(model).items()}
    assert found == {name: rank for name, rank in report["ranks"].items() if rank is not None}


def test_a_run_goes_on_from_its_last_checkpoint(run: Any, tmp_path: Path):
    whole = run(output_dir=tmp_path / "whole", target_param_ratio=0.5)
    assert whole.code == 0, whole.err
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = run(
        output_dir=tmp_path / "resumed", target_param_ratio=0.5, resume_from_checkpoint=checkpoint
    )
    assert resumed.code == 0, resumed.err
    first, second = (
        hf_lowrank.load(tmp_path / name / "final").state_dict() for name in ("whole", "resumed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`Trainer` writes into the folder itself, trainer_state.json last."""
    output = tmp_path / "out"
    done = run(output_dir=output, target_param_ratio=0.5)
    assert done.code == 0, done.err
    whole = (output / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(output / "final")
    (output / "checkpoint-8" / "trainer_state.json").write_text('{"epoch": 1', "utf-8")
    shutil.copytree(output / "checkpoint-8", output / "checkpoint-12")
    (output / "checkpoint-12" / "trainer_state.json").unlink()
    taken = []
    train = LowRankTrainer.train

    def note(self: Any, **options: Any) -> Any:
        taken.append(Path(options["resume_from_checkpoint"]).name)
        return train(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LowRankTrainer, "train", note)
        again = run(output_dir=output, target_param_ratio=0.5, resume_from_checkpoint="last")
    assert again.code == 0, again.err
    assert taken == ["checkpoint-4"]
    assert (output / "final" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "nowhere.txt"}, "nowhere.txt"),
        ({"selection_tolerance": -1}, "selection_tolerance must be a number > 0"),
        ({"resume_from_checkpoint": "last"}, "holds no checkpoint"),
        ({"resume_from_checkpoint": "gone"}, "gone: no such folder"),
        ({"model": "nobody/no-such-model"}, "nobody/no-such-model"),
    ],
    ids=str,
)
def test_a_mistake_ends_with_one_line(
    run: Any, changes: dict[str, Any], message: str, tmp_path: Path
):
    assert message in run(output_dir=tmp_path / "out", **changes).error
    assert not (tmp_path / "out" / "final").exists()


def test_training_text_is_not_evaluation_text(run: Any, inputs: Inputs, tmp_path: Path):
    done = run(output_dir=tmp_path / "out", evaluation=inputs.calibration)
    assert "is both training and evaluation text" in done.error

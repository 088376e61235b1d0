"""Two processes on the CPU, as `accelerate launch --num_processes 2` starts them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import needs_gloo, run_together

WORKER = """
import json, os, sys
from pathlib import Path
import torch
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.rebuild import factorized_layers
from tests.tiny_models import written_batches, tiny_bert_classifier, tiny_llama
from tests.training import sentence_rows, trainer_for

folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
trainer = trainer_for(
    tiny_bert_classifier(), sentence_rows(), folder / "run", per_device_train_batch_size=batch_size,
    save_strategy="epoch", selection_tolerance=0.02, tolerance_reference="start", optim="sgd",
    learning_rate=0.01, train_sampling_strategy="sequential",
    ddp_backend="gloo" if "RANK" in os.environ else None,
)
trainer.train()
loss = measure_loss(trainer.model, trainer.selection_batches()).mean
ranks = {name: layer.rank for name, layer in factorized_layers(trainer.model).items()}
weights = float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters()))
llama = tiny_llama()
texts = written_batches(llama, 5)
config = LowRankConfig(param_ratio=0.6, label_source="model")
report = compress(llama, config, texts, texts[:2], cache_dir=folder / "cache")
compressed = {"ranks": report.ranks, "loss": report.evaluation.loss_after}
config = config.replace(channels=True)
report = compress(tiny_llama(), config, texts, texts[:2], cache_dir=folder / "cache")
narrowed = {"shapes": report.narrowed, "ranks": report.ranks, "loss": report.evaluation.loss_after}
found = {
    "ranks": ranks, "loss": loss, "weights": weights, "world": trainer.args.world_size,
    "compressed": compressed, "narrowed": narrowed,
}
rank = os.environ.get("RANK", "0")
(folder / f"result-{rank}.json").write_text(json.dumps(found))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def launch(folder: Path, processes: int, batch_size: int) -> list[dict[str, Any]]:
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    run_together(script, processes, folder, batch_size)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]


@needs_gloo
def test_two_processes_end_as_one_with_the_same_global_batch(tmp_path: Path):
    (alone,) = launch(tmp_path / "alone", 1, 8)
    first, second = launch(tmp_path / "both", 2, 4)
    assert first["world"] == second["world"] == 2
    assert any(rank < 32 for rank in first["ranks"].values())
    assert first == second
    assert first["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-6)
    assert first["ranks"] == alone["ranks"]
    # Five batches on two processes: sums over both, spectra shared out, one plan.
    assert first["compressed"]["ranks"] == alone["compressed"]["ranks"]
    assert first["compressed"]["loss"] == pytest.approx(alone["compressed"]["loss"], abs=1e-5)
    assert first["narrowed"]["shapes"]
    loss = alone["narrowed"].pop("loss")
    assert first["narrowed"].pop("loss") == pytest.approx(loss, abs=1e-5)
    assert first["narrowed"] == alone["narrowed"]
    saved = sorted(path.name for path in (tmp_path / "both" / "run").iterdir())
    assert saved == ["checkpoint-2", "checkpoint-4"]
    assert len(list((tmp_path / "both" / "run" / "checkpoint-4").glob("*.safetensors"))) == 1

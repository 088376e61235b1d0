"""Block by block: where it may work, and two processes, which make the model that one makes."""

import json
from pathlib import Path

import pytest
import torch

from hf_lowrank import LowRankConfig, compress_checkpoint, load
from hf_lowrank.errors import StorageError
from tests.processes import needs_gloo, run_together
from tests.tiny_models import logits, tiny_llama, written_batches

WORKER = """
import json, sys
from pathlib import Path
import torch
from hf_lowrank import LowRankConfig, compress_checkpoint
from hf_lowrank.compression.streaming.states import States
from tests.tiny_models import tiny_llama, written_batches

folder, dense = map(Path, sys.argv[1:])
written = []
keep = States.write
def counted(states, level, number, hidden):
    written.append((level, number))
    keep(states, level, number, hidden)
States.write = counted
texts = written_batches(tiny_llama(), num_batches=7)
roles = {"calibration": texts[:3], "evaluation": texts[3:5], "held_out": texts[5:]}
for name, settings in {
    "size": {"param_ratio": 0.6, "channels": True, "measured_prices": True},
    "tolerance": {"loss_tolerance": 0.05, "metric": "whitened"},
}.items():
    report = compress_checkpoint(
        dense, folder / name, LowRankConfig(**settings), **roles, progress=False
    )
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
(folder / f"written-{rank}.json").write_text(json.dumps(written))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def test_a_work_folder_in_the_output_is_refused(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "file").touch()
    for place, message in {"out/work": "can't lie in the output folder", "file": "file"}.items():
        with pytest.raises(StorageError, match=message):
            compress_checkpoint(
                tmp_path / "dense",
                tmp_path / "out",
                LowRankConfig(rank=4, metric="plain"),
                work_dir=tmp_path / place,
            )
    assert not (tmp_path / "out").exists()


@needs_gloo
def test_two_processes_write_what_one_writes(tmp_path: Path):
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    written = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run_together(script, processes, folder, tmp_path / "dense")
        files = [folder / f"written-{rank}.json" for rank in range(processes)]
        written[processes] = [len(json.loads(file.read_text())) for file in files]
        names = {path.name for path in folder.iterdir()} - {file.name for file in files}
        assert names == {"size", "tolerance"}  # what lay between is gone
    assert max(written[2]) < 0.7 * written[1][0]
    batch = written_batches(tiny_llama(), num_batches=1)[0]
    for name in ("size", "tolerance"):
        alone, both = (json.loads((tmp_path / n / name / "report.json").read_text()) for n in "12")
        for field in ("ranks", "narrowed", "parameters", "bytes"):
            assert both[field] == alone[field], field
        found = [report["evaluation"]["loss_after"] for report in (alone, both)]
        assert found[1] == pytest.approx(found[0], rel=1e-5)
        models = [load(tmp_path / n / name) for n in "12"]
        torch.testing.assert_close(logits(models[1], batch), logits(models[0], batch))

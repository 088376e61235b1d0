"""Block by block from disk to disk: the same model as in memory, also after kills."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_lowrank import LowRankConfig, compress, compress_checkpoint, load
from hf_lowrank.compression import cache
from hf_lowrank.compression.streaming import block_analysis, space, states
from hf_lowrank.compression.streaming.block_stream import BlockStream
from hf_lowrank.compression.streaming.freed_memory import give_back_freed
from hf_lowrank.compression.streaming.tensors import CheckpointTensors
from hf_lowrank.errors import CheckpointError, ConfigError, DataError, StorageError, TargetError
from tests.tiny_models import (
    LLAMA_LIKE,
    Batch,
    build,
    logits,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_batches,
    written_batches,
)

BOTH = {"channels": True, "measured_prices": True}


def tiny_gemma() -> Gemma3ForCausalLM:
    """Sliding and full attention in turn, a rotary table for each; norms after the layers, too."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    settings = LLAMA_LIKE | {"num_hidden_layers": 3, "head_dim": 8, "layer_types": kinds}
    config = Gemma3TextConfig(**settings, sliding_window=4, tie_word_embeddings=True)
    return build(Gemma3ForCausalLM, config, 0)


def tiny_qwen() -> Qwen2ForCausalLM:
    """Biases on q, k and v; a head of its own."""
    return build(Qwen2ForCausalLM, Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=False), 0)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(num_hidden_layers=3),
    "gemma": tiny_gemma,
    "gpt2": tiny_gpt2,
    "qwen": tiny_qwen,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model in several files."""
    found = {}
    for name, made in MODELS.items():
        found[name] = tmp_path_factory.mktemp(name)
        made().save_pretrained(found[name], max_shard_size="40KB")
        assert len(list(found[name].glob("*.safetensors"))) > 1
    return found


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Eight batches, some with padding."""
    return [*written_batches(tiny_llama(), num_batches=4), *token_batches(num_batches=4)]


def texts(batches: list[Batch]) -> dict[str, list[Batch]]:
    return {
        "calibration": [*batches[:2], *batches[4:6]],
        "evaluation": batches[2:3],
        "held_out": [batches[3], batches[6]],
    }


def content(folder: Path) -> dict[str, bytes]:
    """What is in a checkpoint, but for the times in its report."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"param_ratio": 0.6}),
        ("llama", {"param_ratio": 0.6, **BOTH}),
        ("llama", {"param_ratio": 0.7, "metric": "plain", "form": "compact"}),
        ("llama", {"param_ratio": 0.7, "label_source": "model", "seed": 3}),
        ("gemma", {"loss_tolerance": 0.02, "channels": True}),
        ("gemma", {"param_ratio": 0.7, "metric": "whitened"}),
        ("gpt2", {"param_ratio": 0.7, "form": "compact", **BOTH}),
        ("gpt2", {"param_ratio": 0.7, "weights": "int4", "form": "factors", **BOTH}),
        ("llama", {"rank_pattern": {"*.1.*": None}, "weights": "int8", "rank": 8}),
        ("qwen", {"rank": 12, "rank_pattern": {"*.0.mlp.up_proj": None}}),
    ],
)
def test_the_model_is_the_one_made_in_memory(
    name: str,
    settings: dict[str, Any],
    folders: dict[str, Path],
    batches: list[Batch],
    tmp_path: Path,
):
    config, roles = LowRankConfig(**settings), texts(batches)
    streamed = compress_checkpoint(folders[name], tmp_path / "out", config, **roles, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    report = compress(model, config, **roles, progress=False)
    assert streamed.ranks == report.ranks
    assert any(streamed.ranks.values()) or streamed.narrowed
    assert streamed.narrowed == report.narrowed
    assert streamed.parameters == report.parameters
    assert streamed.untouched == report.untouched
    assert streamed.measured_prices == report.measured_prices
    assert streamed.quantization == report.quantization
    assert streamed.bytes == report.bytes
    assert streamed.evaluation.loss_before == pytest.approx(report.evaluation.loss_before, rel=1e-5)
    assert streamed.evaluation.loss_after == pytest.approx(report.evaluation.loss_after, rel=1e-5)
    assert [each.param_ratio for each in streamed.probes] == [
        each.param_ratio for each in report.probes
    ]
    loaded = load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, batches[0]), logits(model, batches[0]))
    assert loaded.config.quantization_config.ranks == model.config.quantization_config.ranks
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_only_some_layers_can_be_targeted(
    folders: dict[str, Path], batches: list[Batch], tmp_path: Path
):
    config = LowRankConfig(param_ratio=0.6, target_modules=["layers.1.mlp.*"])
    roles = texts(batches)
    streamed = compress_checkpoint(
        folders["llama"], tmp_path / "out", config, **roles, progress=False
    )
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert streamed.ranks == compress(model, config, **roles, progress=False).ranks
    assert len(streamed.ranks) == 3


class Killed(BaseException):
    """Nothing in the package catches it."""


@contextmanager
def killed_after(writes: int) -> Iterator[None]:
    """Lets so many files be written, and ends the run at the next."""
    left = [writes]
    before = cache.write_stored

    def write(path: Path, value: object) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        before(path, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "write_stored", write)
        patch.setattr(block_analysis, "write_stored", write)
        yield


@pytest.mark.parametrize(
    ("settings", "writes"), [({"param_ratio": 0.6, **BOTH}, 11), ({"loss_tolerance": 0.05}, 23)]
)
def test_a_run_that_is_killed_again_and_again_makes_the_same_bytes(
    settings: dict[str, Any],
    writes: int,
    folders: dict[str, Path],
    batches: list[Batch],
    tmp_path: Path,
):
    config, roles = LowRankConfig(**settings), texts(batches)

    def run(name: str) -> None:
        compress_checkpoint(folders["gemma"], tmp_path / name, config, **roles, progress=False)

    run("undisturbed")
    kills = 0
    while not (tmp_path / "out").exists():
        try:
            with killed_after(writes):
                run("out")
        except Killed:
            kills += 1
        assert kills < 100
    assert kills >= 3
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["seed", "text", "model"])
def test_what_belongs_to_another_run_is_not_used(change: str, batches: list[Batch], tmp_path: Path):
    roles, config = texts(batches), LowRankConfig(param_ratio=0.6, label_source="model")
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(Killed), killed_after(12):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", config, **roles, progress=False)
    (left,) = (tmp_path / ".out.stream").iterdir()
    if change == "seed":
        config = config.replace(seed=1)
    elif change == "text":
        roles["calibration"] = roles["calibration"][1:]
    else:
        tiny_llama(seed=1).save_pretrained(tmp_path / "dense")
    with pytest.raises(Killed), killed_after(12):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", config, **roles, progress=False)
    (other,) = (tmp_path / ".out.stream").iterdir()
    assert other != left
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", config, **roles, progress=False)
    compress_checkpoint(tmp_path / "dense", tmp_path / "new", config, **roles, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_another_size_is_cut_from_the_same_spectra(
    folders: dict[str, Path], batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(ratio: float) -> None:
        config, out = LowRankConfig(param_ratio=ratio), tmp_path / str(ratio)
        more = {"work_dir": tmp_path / "work", "progress": False}
        report = compress_checkpoint(folders["llama"], out, config, **texts(batches), **more)
        assert report.parameters.targeted_kept <= ratio * report.parameters.targeted_dense

    run(0.6)
    monkeypatch.delattr(block_analysis.BlockAnalyst, "_analyze")  # not needed a second time
    run(0.8)
    assert len(list((tmp_path / "work").iterdir())) == 1


def test_one_block_is_in_memory_at_a_time(
    folders: dict[str, Path], batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alive: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    most = [0]
    read = CheckpointTensors.read

    def counted(self: CheckpointTensors, wanted: Callable[[str], bool]) -> None:
        read(self, wanted)
        known = {id(ref()) for _, ref in alive}
        for name, parameter in self.model.named_parameters():
            if parameter.device.type != "meta" and id(parameter) not in known:
                alive.append((".".join(name.split(".")[:3]), weakref.ref(parameter)))
        blocks = {place for place, ref in alive if ref() is not None and ".layers." in place}
        most[0] = max(most[0], len(blocks))

    monkeypatch.setattr(CheckpointTensors, "read", counted)
    config = LowRankConfig(param_ratio=0.6, **BOTH)
    compress_checkpoint(
        folders["llama"], tmp_path / "out", config, **texts(batches), progress=False
    )
    assert len({place for place, _ in alive if ".layers." in place}) == 3
    assert most == [1]


def test_too_little_disk_is_refused_before_the_work(
    folders: dict[str, Path], batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(BlockStream, "forward", None)
    wanted = r"needs about 0.\d GB of disk for a while, but only 0.0 GB are free; name another"
    with pytest.raises(StorageError, match=wanted):
        compress_checkpoint(
            folders["llama"], tmp_path / "out", None, **texts(batches), progress=False
        )


def test_needs_and_progress_are_said(
    folders: dict[str, Path], batches: list[Batch], tmp_path: Path, capsys: Any
):
    config = LowRankConfig(param_ratio=0.6)
    compress_checkpoint(folders["llama"], tmp_path / "out", config, **texts(batches))
    said = capsys.readouterr().err
    assert "... needs about 0.0 GB of disk, " in said
    assert "... forward: 0 of 12 batches" in said
    assert "... analyze: 0 of 3 blocks" in said


def test_goals_that_need_the_whole_model_are_refused(folders: dict[str, Path], tmp_path: Path):
    config = LowRankConfig(megabytes=1)
    with pytest.raises(ConfigError, match=r"megabytes and objective .latency. are not done block"):
        compress_checkpoint(folders["llama"], tmp_path / "out", config)


def test_models_that_are_no_chain_of_blocks_are_refused(batches: list[Batch], tmp_path: Path):
    tiny_t5().save_pretrained(tmp_path / "t5")
    with pytest.raises(DataError, match="not a causal language model"):
        compress_checkpoint(tmp_path / "t5", tmp_path / "out")
    model = tiny_llama()
    with pytest.raises(TargetError, match=r"lm_head is in no list of blocks\); compress it in mem"):
        BlockStream(model, ["lm_head"], None, tmp_path)  # type: ignore[arg-type]


def test_hidden_states_that_change_between_blocks_are_refused(
    folders: dict[str, Path],
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    hand_on = BlockStream._hand_on
    monkeypatch.setattr(
        BlockStream, "_hand_on", lambda self, i, hidden: hand_on(self, i, hidden * 1)
    )
    with pytest.raises(TargetError, match="LlamaForCausalLM: can't be compressed block by block, "):
        compress_checkpoint(
            folders["llama"], tmp_path / "out", None, **texts(batches), progress=False
        )


def test_files_that_are_missing_or_of_another_kind_are_refused(
    folders: dict[str, Path], tmp_path: Path
):
    with pytest.raises(DataError, match=r"a .gguf file is read as a whole"):
        compress_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    model = tiny_llama(tie_word_embeddings=False)
    state = model.state_dict()
    del state["lm_head.weight"]
    model.save_pretrained(tmp_path / "headless", state_dict=state)
    with pytest.raises(DataError, match=r"has no weights for 1 parameters.*lm_head"):
        compress_checkpoint(tmp_path / "headless", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes(
        (folders["llama"] / "config.json").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"has no model.safetensors"):
        compress_checkpoint(tmp_path / "empty", tmp_path / "out")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory")
def test_freed_memory_goes_back_to_the_system_though_pieces_of_it_are_held():
    give_back_freed()
    before = anonymous_bytes()
    blocks, held = [], []
    for _ in range(500):
        blocks.append(torch.ones(16_000))  # below what the C library maps apart
        held.append(torch.ones(8))
    blocks.clear()
    give_back_freed()
    assert anonymous_bytes() < before + 16_000_000  # of 32
    assert len(held) == 500

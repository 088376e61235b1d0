"""Checkpoints of mixtures whose experts are narrower, or fewer, than their config says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression import expert_analysis
from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.fused_experts import experts_shape, find_router, small_experts
from hf_lowrank.format.layout import ExpertsLeft, Layout
from hf_lowrank.format.rebuild import replace_with_lowrank_
from tests.format import BATCH, edit_config, edit_tensors, load_clean, refused, same_tensors
from tests.format.conftest import Saved
from tests.format.test_remote_code import SCRIPT
from tests.tiny_mixtures import CHOSEN, EXPERTS, MIXTURES, WIDTH, mixtral
from tests.tiny_models import logits, token_batches

NAME = "model.layers.1.mlp.experts"
BATCHES = token_batches(3)


def saved_mixture(name: str, folder: Path) -> Saved:
    """Compressed so that every layer with a router loses an expert, and all of them channels."""

    def last_is_free(moments: Any, damping: float) -> torch.Tensor:
        return torch.arange(len(moments.tokens), 0, -1).double() - 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_analysis, "_drop_prices", last_is_free)
        model = MIXTURES[name]()
        compress(model, LowRankConfig(param_ratio=0.5, channels=True), BATCHES, progress=False)
    model.save_pretrained(folder)
    return Saved(model, folder)


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Saved:
    return saved_mixture(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: Any) -> Saved:
    return saved_mixture("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture
def broken(gpt_oss: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gpt_oss.folder, tmp_path / "broken"))


def test_every_way_in_gives_equal_logits(mixture: Saved):
    settings = json.loads((mixture.folder / "config.json").read_text())["quantization_config"]
    left = settings["experts"]
    assert settings["format_version"] == 3
    assert left.keys() == small_experts(mixture.model).keys()
    dense = experts_shape(MIXTURES[mixture.folder.name[:-1]]().get_submodule(NAME))
    assert {each["experts"] < dense.size.experts for each in left.values()} == {True}
    for model in (
        load_clean(AutoModelForCausalLM, mixture.folder),
        hf_lowrank.load(mixture.folder),
    ):
        assert type(model) is type(mixture.model)
        assert torch.equal(logits(model, BATCH), logits(mixture.model, BATCH))
        assert same_tensors(model, mixture.model)


def test_a_model_that_was_loaded_is_saved_again(mixture: Saved, tmp_path: Path):
    hf_lowrank.load(mixture.folder).save_pretrained(tmp_path)
    again = hf_lowrank.load(tmp_path)
    assert torch.equal(logits(again, BATCH), logits(mixture.model, BATCH))
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(mixture.folder / "model.safetensors").keys()
    )


def test_engines_find_one_matrix_for_each_expert(tmp_path: Path):
    saved = saved_mixture("qwen3_moe", tmp_path)
    left = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["experts"]
    tensors = load_file(tmp_path / "model.safetensors")
    count, width = left[NAME]["experts"], left[NAME]["width"]
    for name, shape in (("gate_proj", [width, 32]), ("down_proj", [32, width])):
        found = {k for k in tensors if k.startswith(NAME) and k.endswith(f"{name}.weight")}
        assert found == {f"{NAME}.{expert}.{name}.weight" for expert in range(count)}
        assert {tuple(tensors[key].shape) for key in found} == {tuple(shape)}
    assert tensors["model.layers.1.mlp.gate.weight"].shape == (count, 32)
    assert saved.model.model.layers[1].mlp.gate.num_experts == count


def test_they_load_where_hf_lowrank_is_not_installed(gpt_oss: Saved, tmp_path: Path):
    shutil.copytree(gpt_oss.folder, tmp_path / "gpt_oss")
    save_file(BATCH, tmp_path / "gpt_oss-inputs.safetensors")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    auto_class = json.dumps({"gpt_oss": "AutoModelForCausalLM"})
    script = SCRIPT.replace("first = not found", "first = False")  # which transformers refuses
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), auto_class],
        cwd=tmp_path,
        env={**kept, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs = load_file(tmp_path / "gpt_oss-outputs.safetensors")
    assert torch.equal(outputs["first"], logits(gpt_oss.model, BATCH))
    assert torch.equal(outputs["again"], outputs["first"])


def edit_left(folder: Path, **changes: Any) -> None:
    edit_config(folder, lambda c: c["quantization_config"]["experts"][NAME].update(changes))


def test_experts_of_other_sizes_than_listed_are_refused(broken: Path):
    edit_left(broken, width=WIDTH)
    refused(broken, r"layers\.1\.mlp\.experts\.\w+ has")


def test_experts_that_are_joined_in_loading_are_counted_first(tmp_path: Path):
    saved_mixture("qwen3_moe", tmp_path)
    left = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["experts"]
    edit_left(tmp_path, width=left[NAME]["width"] + 8)
    refused(tmp_path, r"experts\.\w+ has [\d,]+ numbers, config\.json asks for [\d,]+, of shape")


def test_a_router_of_another_size_is_refused(broken: Path):
    name = "model.layers.1.mlp.router.bias"
    edit_tensors(broken, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refused(broken, r"router\.bias has shape \[\d\], config\.json asks for \[\d\]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, r'must be {"experts": count, "width": channels}, got'),
        ({"experts": True}, r'must be {"experts": count, "width": channels}, got'),
        ({"more": 1}, r'must be {"experts": count, "width": channels}, got'),
        ({"experts": 99}, rf"99 experts of \d+ channels are not within .* {EXPERTS} experts of"),
        ({"experts": 1}, rf"its router chooses {CHOSEN} experts, and 1 experts of \d+ channels"),
    ],
)
def test_sizes_that_no_writer_writes_are_refused(broken: Path, changes: Any, message: str):
    edit_left(broken, **changes)
    refused(broken, message)


def test_a_field_that_is_no_mapping_is_refused():
    with pytest.raises(CheckpointError, match=r"experts must map names to what is left, got \[\]"):
        Layout.from_settings({"format_version": 3, "ranks": {}, "experts": []})


def test_names_that_are_no_experts_are_refused():
    left = ExpertsLeft(2, 8)
    with pytest.raises(ValueError, match=r"config\.json says what is left of x, but Mixtral"):
        replace_with_lowrank_(mixtral(), Layout({}, experts={"x": left}))
    with pytest.raises(ValueError, match="mlp: MixtralSparseMoeBlock holds no fused experts"):
        replace_with_lowrank_(mixtral(), Layout({}, experts={"model.layers.0.mlp": left}))


def test_groups_of_experts_and_what_stands_beside_the_router_keep_all_experts():
    model = MIXTURES["deepseek_v3"]()
    block = model.model.layers[1].mlp
    assert find_router(model, NAME) == "model.layers.1.mlp.gate"
    block.gate.num_group = 2
    assert find_router(model, NAME) is None
    block.gate.num_group = 1
    block.register_buffer("correction", torch.zeros(EXPERTS))
    assert find_router(model, NAME) is None
    with pytest.raises(ValueError, match=f"experts: no router of {EXPERTS} rows stands beside it"):
        replace_with_lowrank_(model, Layout({}, experts={NAME: ExpertsLeft(EXPERTS - 1, WIDTH)}))

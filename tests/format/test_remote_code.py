"""Checkpoints where hf_lowrank is not installed, in a process that cannot import it.

REMOTE_PYTHON names another interpreter for that process, such as one with transformers 4.57.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankLinear, compress
from hf_lowrank.compression.while_loading import LowRankHfQuantizer
from hf_lowrank.format import native_classes
from hf_lowrank.format.bundle import loading_code
from tests.tiny_models import batches_for, logits, tiny_bert_classifier, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.oldest

AUTO_CLASSES = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "narrowed": "AutoModelForCausalLM",
}
# Where the other process has torchao, too.
QUANTIZED = ("int8", "int4") if find_spec("torchao") and "REMOTE_PYTHON" not in os.environ else ()
AUTO_CLASSES |= dict.fromkeys(QUANTIZED, "AutoModelForCausalLM")
ROPE = {"rope_type": "default", "rope_theta": 500.0}  # another than the default
SCRIPT = """
import json, sys, warnings
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_lowrank":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Block())
import torch, transformers
from safetensors.torch import load_file, save_file
try:
    import hf_lowrank
    raise SystemExit("hf_lowrank can be imported, so nothing is tested")
except ModuleNotFoundError:
    pass

root = Path(sys.argv[1])
found = {}
for name, auto_class in json.loads(sys.argv[2]).items():
    inputs = load_file(root / f"{name}-inputs.safetensors")
    loader = getattr(transformers, auto_class)

    def run(folder, **kwargs):
        model, info = loader.from_pretrained(folder, output_loading_info=True, **kwargs)
        with torch.no_grad():
            logits = model(**inputs).logits
        keys = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys")}
        return model, keys, logits

    # Once the copied file has run, "lowrank" is known to this process: so first without it.
    first = not found
    untrusted = run(root / name)[1] if first else None
    trusted, keys, logits = run(root / name, trust_remote_code=True)
    trusted.save_pretrained(root / f"{name}-again")
    again, keys_again, logits_again = run(root / f"{name}-again", trust_remote_code=True)
    save_file({"first": logits, "again": logits_again}, root / f"{name}-outputs.safetensors")
    found[name] = {
        "untrusted": untrusted,
        "class": [type(trusted).__module__, type(trusted).__name__],
        "keys": [keys, keys_again],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def models():
    built = {
        "llama": tiny_llama(rope_parameters=ROPE),
        "gpt2": tiny_gpt2(),
        "bert": tiny_bert_classifier(),
    }
    for model in built.values():
        compress(model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    small = tiny_gpt2(seed=1)
    compress(small, LowRankConfig(param_ratio=0.6, channels=True), batches_for(small, 2))
    built["narrowed"] = small
    for weights in QUANTIZED:
        built[weights] = tiny_gpt2() if weights == "int8" else tiny_llama(rope_parameters=ROPE)
        config = LowRankConfig(param_ratio=0.6, metric="plain", weights=weights)
        compress(built[weights], config, progress=False)
    return built


@pytest.fixture(scope="module")
def inputs(models):
    batches = {name: batches_for(model)[0] for name, model in models.items()}
    return {name: {k: v for k, v in b.items() if k != "labels"} for name, b in batches.items()}


@pytest.fixture(scope="module")
def root(models, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        save_file(inputs[name], folder / f"{name}-inputs.safetensors")
    return folder


@pytest.fixture(scope="module")
def elsewhere(root, tmp_path_factory):
    """What another process found, with an own cache for downloaded code."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    cache = tmp_path_factory.mktemp("modules")
    result = subprocess.run(
        [
            os.environ.get("REMOTE_PYTHON", sys.executable),
            "-c",
            SCRIPT,
            str(root),
            json.dumps(AUTO_CLASSES),
        ],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={**kept, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_trusted_code_gives_the_native_class_with_all_keys(elsewhere, models, name):
    found = elsewhere[0][name]
    assert found["class"] == [type(models[name]).__module__, type(models[name]).__name__]
    assert found["keys"] == [{"missing_keys": [], "unexpected_keys": []}] * 2


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_trusted_code_gives_equal_logits_also_after_a_second_save(
    elsewhere, root, models, inputs, name
):
    outputs = load_file(root / f"{name}-outputs.safetensors")
    expected = logits(models[name], inputs[name])
    assert torch.equal(outputs["first"], expected)
    assert torch.equal(outputs["again"], expected)


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_what_was_saved_elsewhere_loads_here(elsewhere, root, models, inputs, name):
    model = hf_lowrank.load(root / f"{name}-again")
    assert type(model) is type(models[name])
    assert torch.equal(logits(model, inputs[name]), logits(models[name], inputs[name]))
    assert model.config.quantization_config == models[name].config.quantization_config


def test_without_import_and_trust_transformers_leaves_the_layers_random(elsewhere):
    """Not a wish but a fact: it only warns. Hence the copied code, and `hf_lowrank.load`."""
    keys = elsewhere[0]["llama"]["untrusted"]
    layer = "model.layers.0.self_attn.q_proj"
    assert f"{layer}.weight" in keys["missing_keys"]
    assert f"{layer}.lowrank_A.weight" in keys["unexpected_keys"]
    assert "lowrank" in elsewhere[1]


def test_the_copied_code_is_the_package_s_own(root):
    for name in AUTO_CLASSES:
        assert (root / name / "modeling_lowrank.py").read_text("utf-8") == loading_code()


def test_the_config_names_a_loader_for_every_auto_class_of_the_model(root):
    config = json.loads((root / "bert" / "config.json").read_text())
    assert (
        config["auto_map"].items()
        >= {
            "AutoModel": "modeling_lowrank.LowRankAutoModel",
            "AutoModelForSequenceClassification": (
                "modeling_lowrank.LowRankAutoModelForSequenceClassification"
            ),
        }.items()
    )
    assert "AutoModelForSpeechSeq2Seq" not in config["auto_map"]
    for target in config["auto_map"].values():
        assert hasattr(native_classes, target.split(".")[1])


def test_only_the_main_process_writes_the_code(models, tmp_path):
    models["llama"].save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "modeling_lowrank.py").exists()


def test_trusting_the_code_beside_an_import_gives_the_package_s_layers(
    root, models, inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = AutoModelForCausalLM.from_pretrained(root / "llama", trust_remote_code=True)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert type(model.hf_quantizer) is LowRankHfQuantizer
    assert torch.equal(logits(model, inputs["llama"]), logits(models["llama"], inputs["llama"]))

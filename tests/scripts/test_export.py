"""scripts/export.py: what is refused before any long work, and a whole run that needs no engine."""

import json
import shutil
from pathlib import Path

import pytest

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.cli.export_command import ENGINES
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.inputs.encoders import load_encoder
from tests.scripts import EncoderFiles, InProcess, Inputs, leftovers, must_not_happen
from tests.serving.exports.checkpoints import LLAMA, byte_tokenizer
from tests.tiny_models import tiny_llama, written_batches


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess("export", monkeypatch, capsys)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama, and what channels alone, ranks, and int8 make of it."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, settings in {
        "dense": {},
        "narrowed": {"channels_only": True},
        "ranks": {"channels": False},
        "int8": {"channels_only": True, "weights": "int8"},
    }.items():
        model = tiny_llama(vocab_size=LLAMA["vocab_size"])
        if settings:
            config = LowRankConfig(param_ratio=0.8, measured_prices=False, **settings)
            compress(model, config, written_batches(model, 2), progress=False)
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every engine's packages were there; nothing may be loaded."""
    monkeypatch.setattr("hf_lowrank.serving.packages._is_there", lambda name: True)
    for name in ("load_any_causal_lm", "load_encoder"):
        monkeypatch.setattr(
            f"hf_lowrank.cli.export_command.{name}", must_not_happen("the model was loaded")
        )


@pytest.mark.parametrize("name", ["dense", "narrowed"])
def test_a_llama_becomes_a_gguf_file(export: InProcess, checkpoints: Path, tmp_path: Path, name):
    gguf = pytest.importorskip("gguf", reason="an extra, part of dev")
    output = tmp_path / "output"
    done = export("--model", checkpoints / name, "--to", "gguf", "--output_dir", output)
    assert done.code == 0, done.err
    assert [path.name for path in output.iterdir()] == ["model.gguf"]
    assert f"{output}: 0.1 MB, made for gguf" in done.out
    assert len(gguf.GGUFReader(output / "model.gguf").tensors) == 20


@pytest.mark.parametrize("name", ["ranks", "int8"])
@pytest.mark.usefixtures("installed")
def test_llama_cpp_knows_no_ranks(export: InProcess, checkpoints: Path, tmp_path: Path, name):
    arguments = ("--model", checkpoints / name, "--to", "gguf", "--output_dir", tmp_path / "out")
    error = export(*arguments).error
    assert error.startswith(f"{checkpoints / name}: model.layers.")
    assert "is low-rank, quantized or a smaller expert, for which llama.cpp has no graph" in error
    assert "compress with --channels_only" in error
    assert "hf_lowrank.merge" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["openvino", "onnx"])
@pytest.mark.usefixtures("installed")
def test_quantized_layers_are_for_the_engines_own_tools(
    export: InProcess, checkpoints: Path, tmp_path: Path, to
):
    arguments = ("--model", checkpoints / "int8", "--to", to, "--output_dir", tmp_path / "out")
    error = export(*arguments).error
    assert "is quantized, which can't be exported; compress without --weights" in error


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--to": "openvin"}, "to must be one of openvino, onnx, gguf; got 'openvin'."),
        ({"--to": None}, "to must be one of openvino, onnx, gguf; got None."),
        ({"--output_dir": None}, "output_dir names the folder to write; give --output_dir."),
        ({"--dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16; got 'int8'."),
        ({"--to": "onnx", "--dtype": "float16"}, "onnx files are float32, got dtype 'float16'"),
        ({"--model": "nowhere/at/all"}, "nowhere/at/all: no such folder, and the Hub has no such"),
    ],
)
def test_wrong_words_are_refused(
    export: InProcess, checkpoints: Path, tmp_path: Path, changes, message
):
    settings = {
        "--model": checkpoints / "dense",
        "--to": "openvino",
        "--output_dir": tmp_path / "out",
        **changes,
    }
    words = [part for name, value in settings.items() if value for part in (name, value)]
    assert export(*words).error.startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("installed")
def test_a_folder_that_holds_something_is_left_alone(
    export: InProcess, checkpoints: Path, tmp_path: Path
):
    (tmp_path / "mine.txt").write_text("mine")
    arguments = ("--model", checkpoints / "dense", "--to", "onnx", "--output_dir", tmp_path)
    assert export(*arguments).error.startswith(f"{tmp_path}: exists and is not empty")


@pytest.mark.usefixtures("installed")
def test_a_folder_that_is_no_model_is_refused(export: InProcess, tmp_path: Path):
    (tmp_path / "model").mkdir()
    arguments = ("--model", tmp_path / "model", "--to", "onnx", "--output_dir", tmp_path / "out")
    assert export(*arguments).error.startswith(f"{tmp_path / 'model'}: is not a readable model")


@pytest.mark.usefixtures("installed")
def test_an_encoder_is_no_gguf_file(export: InProcess, files, tmp_path: Path):
    arguments = ("--model", files.model, "--to", "gguf", "--output_dir", tmp_path / "out")
    assert "is an encoder; only Llama models become .gguf files" in export(*arguments).error


def test_a_compressed_encoder_reaches_the_exporter_as_it_is(
    export: InProcess, files: EncoderFiles, tmp_path: Path, monkeypatch
):
    encoder = load_encoder(str(files.model))
    compress(encoder.model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    encoder.model.save_pretrained(tmp_path / "small")
    encoder.tokenizer.save_pretrained(tmp_path / "small")
    given = {}

    def write(model, tokenizer, loss, path):
        given["ranks"] = {name: layer.rank for name, layer in factorized_layers(model).items()}
        path.touch()

    monkeypatch.setattr("hf_lowrank.cli.export_command.export_onnx", write)
    monkeypatch.setitem(ENGINES, "onnx", lambda: None)
    output = tmp_path / "output"
    done = export("--model", tmp_path / "small", "--to", "onnx", "--output_dir", output)
    assert done.code == 0, done.err
    wanted = factorized_layers(encoder.model)
    assert given["ranks"] == {name: layer.rank for name, layer in wanted.items()}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {p.name for p in output.iterdir()}
    config = json.loads((output / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & config.keys()


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("openvino", r"OpenVINO files need optimum.intel, openvino: pip install 'hf-lowrank[open"),
        ("onnx", "onnx files need onnx, onnxscript, onnxruntime: pip install 'hf-lowrank[onnx]'"),
        ("gguf", ".gguf files need gguf: pip install 'hf-lowrank[gguf]', as docs/serving.md says."),
    ],
)
def test_without_an_engines_packages_its_extra_is_named(
    export: InProcess, checkpoints: Path, tmp_path: Path, monkeypatch, to, message
):
    monkeypatch.setattr("hf_lowrank.serving.packages._is_there", lambda name: False)
    arguments = ("--model", checkpoints / "dense", "--to", to, "--output_dir", tmp_path / "out")
    assert export(*arguments).error.startswith(message)


def test_an_exporter_that_fails_leaves_nothing(
    export: InProcess, checkpoints: Path, inputs: Inputs, tmp_path: Path, monkeypatch
):
    def fail(model, tokenizer, path, dtype):
        path.write_text("half")
        raise ValueError("no such operator")

    monkeypatch.setattr("hf_lowrank.cli.export_command.write_gguf", fail)
    copy = shutil.copytree(checkpoints / "dense", tmp_path / "model")
    arguments = ("--model", copy, "--to", "gguf", "--output_dir", tmp_path / "out")
    assert "can't be written for gguf: no such operator" in export(*arguments).error
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []

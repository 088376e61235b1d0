"""compress_encoder.py: an encoder and lines of text in, a SentenceTransformer folder out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_lowrank.inputs.encoders import load_encoder
from hf_lowrank.report.embedding_report import EmbeddingReport
from tests.scripts import EncoderFiles, InProcess
from tests.scripts.outputs import file_sizes, read_report


def sentence_folder(model: Path, folder: Path, **pooling: object) -> Path:
    """The model as sentence-transformers 2 saves it, in a folder of its own."""
    shutil.copytree(model, folder / "0_Transformer")
    kinds = (
        ("0_Transformer", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Normalize", "Normalize"),
    )
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    settings = pooling or {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    limits = folder / "0_Transformer" / "sentence_bert_config.json"
    limits.write_text(json.dumps({"max_seq_length": 10, "do_lower_case": False}))
    return folder


def test_a_plain_encoder_becomes_a_folder_for_sentence_transformers(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    output = tmp_path / "output"
    done = compress_encoder(*files.arguments(output_dir=output, sts_file=files.pairs))
    assert done.code == 0, done.err
    assert "mean cosine to the dense embedding" in done.out
    assert "Spearman on 20 pairs" in done.out
    report = read_report(output)
    assert report["parameters"]["kept"] == file_sizes(output)["parameters"]
    assert 0 < report["distance"]["cosine"] < 1
    assert report["distance"]["items"] == 32
    assert report["similarity"]["pairs"] == 20
    modules = json.loads((output / "modules.json").read_text())
    assert [each["type"].rsplit(".", 1)[1] for each in modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    settings = json.loads((output / "1_Pooling" / "config.json").read_text())
    assert settings["pooling_mode_mean_tokens"] is True
    assert settings["word_embedding_dimension"] == 32
    card = (output / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert f'SentenceTransformer("{output.name}")' in card
    assert "pipeline_tag: sentence-similarity" in card


def test_the_saved_embeddings_are_those_that_were_measured(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    output = tmp_path / "output"
    done = compress_encoder(*files.arguments(output_dir=output))
    assert done.code == 0, done.err
    found = {}
    texts = files.evaluation.read_text().split("\n")
    for name, folder in (("dense", files.model), ("small", output)):
        tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        found[name] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    cosine = float((found["dense"] * found["small"]).sum(1).mean())
    assert cosine == pytest.approx(read_report(output)["distance"]["cosine"], abs=1e-5)


def test_a_sentence_transformer_says_its_own_pooling_and_length(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    folder = sentence_folder(files.model, tmp_path / "st")
    encoder = load_encoder(str(folder))
    assert (encoder.loss.pooling, encoder.max_length) == ("cls", 10)
    output = tmp_path / "output"
    done = compress_encoder(*files.arguments(model=folder, output_dir=output, param_ratio=0.6))
    assert done.code == 0, done.err
    assert read_report(output)["pooling"] == "cls"
    modules = json.loads((output / "modules.json").read_text())
    assert [each["path"] for each in modules] == ["", "1_Pooling", "2_Normalize"]
    kept = output / "1_Pooling" / "config.json"
    assert kept.read_bytes() == (folder / "1_Pooling" / "config.json").read_bytes()
    assert json.loads((output / "sentence_bert_config.json").read_text())["max_seq_length"] == 10
    assert (output / "model.safetensors").is_file()


def test_the_smallest_model_with_a_cosine(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    output = tmp_path / "output"
    done = compress_encoder(*files.arguments(param_ratio=None, min_cosine=0.97, output_dir=output))
    assert done.code == 0, done.err
    report = EmbeddingReport.load(output)
    assert report.held_out is not None
    assert 0 < report.held_out.mean <= 0.03
    assert "in half the squared distance on held-out calibration text" in done.out


def test_several_sizes_and_a_recovery(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    arguments = files.arguments(param_ratio=None, output_dir=tmp_path / "out", recover_steps=20)
    done = compress_encoder(*arguments, "--param_ratio", 0.6, 0.3)
    assert done.code == 0, done.err
    found = [read_report(tmp_path / "out" / size) for size in ("0.6", "0.3")]
    assert found[0]["distance"]["cosine"] > found[1]["distance"]["cosine"]
    assert found[1]["recovery"]["loss_after"] < found[1]["recovery"]["loss_before"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "Name the dense encoder: --model FOLDER, or a Hub id."),
        ({"min_cosine": 0.9}, "Give one goal: param_ratio or min_cosine."),
        (
            {"param_ratio": None, "min_cosine": 99},
            "min_cosine must lie in (0, 1), got 99.0.",
        ),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0."),
        ({"pooling": "max"}, "pooling must be one of mean, cls, last, output; got 'max'."),
        ({"sts_columns": "a"}, "sts_columns are those of a file; give --sts_file as well."),
        (
            {"onnx": True},
            "onnx files go into the output folder; give --output_dir as well.",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    compress_encoder: InProcess, files: EncoderFiles, changes: dict[str, Any], message: str
):
    assert compress_encoder(*files.arguments(**changes)).error == message


def test_one_file_for_two_purposes_is_refused(compress_encoder: InProcess, files: EncoderFiles):
    done = compress_encoder(*files.arguments(evaluation=files.calibration))
    assert done.error == (
        f"{files.calibration}: is both calibration and evaluation text; the result would look "
        "better than it is. Give two files."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a\tb\n1\t2\n",
            "column 'sentence1' is missing; the header has a, b.",
        ),
        ("sentence1\tsentence2\tscore\nx\ty\n", "line 2 has 2 columns, which is too few."),
        (
            "sentence1\tsentence2\tscore\nx\ty\tgood\n",
            "line 2: the score 'good' is no number; mend it.",
        ),
        (
            "sentence1\tsentence2\tscore\nx\ty\t1\n",
            "has no two pairs with different scores; give more pairs.",
        ),
    ],
)
def test_a_file_that_holds_no_pairs_is_one_sentence(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path, text: str, message: str
):
    path = tmp_path / "pairs.tsv"
    path.write_text(text)
    found = compress_encoder(*files.arguments(sts_file=path)).error
    assert found.removeprefix(f"{path}: ") == message


def test_damaged_sentence_transformers_are_one_sentence(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    folder = sentence_folder(files.model, tmp_path / "st", pooling_mode_max_tokens=True)
    arguments = files.arguments(model=folder)
    pooling = folder / "1_Pooling" / "config.json"
    assert compress_encoder(*arguments).error == (
        f"{pooling}: says pooling max_tokens; one of mean, cls and lasttoken is needed."
    )
    assert compress_encoder(*arguments, "--pooling", "mean").error == (
        f"{folder}: says its own pooling in modules.json; leave pooling out."
    )
    pooling.unlink()
    assert compress_encoder(*arguments).error == (
        f"{folder}: modules.json needs 1_Pooling/config.json, which can't be read (No such file or "
        "directory)."
    )
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))
    assert compress_encoder(*arguments).error == (
        f"{folder}: modules.json must list Transformer, Pooling and maybe Normalize; it lists "
        "Transformer."
    )
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert compress_encoder(*arguments).error == (
        f"{folder}: modules.json has a Dense, which is not known; Transformer, Pooling and "
        "Normalize are."
    )
    (folder / "modules.json").write_text("{")
    assert compress_encoder(*arguments).error.startswith(
        f"{folder / 'modules.json'}: is not JSON ("
    )
    (folder / "modules.json").unlink()
    assert compress_encoder(*arguments).error == (
        f"{folder}: holds neither modules.json nor config.json; is it a model?"
    )


def test_a_classifier_is_no_encoder(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    folder = Path(shutil.copytree(files.model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    assert compress_encoder(*files.arguments(model=folder)).error == (
        f"{folder}: holds a BertForSequenceClassification, not a sentence encoder, so its head "
        "would be lost; load it with its own class and give it to hf_lowrank.compress."
    )


def test_a_compressed_encoder_is_not_compressed_again(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    output = tmp_path / "output"
    assert compress_encoder(*files.arguments(output_dir=output)).code == 0
    found = compress_encoder(*files.arguments(model=output)).error
    assert found.startswith(f"{output}: is already compressed; start from the dense checkpoint")


def test_onnx_without_its_packages_is_one_sentence(
    compress_encoder: InProcess,
    files: EncoderFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = compress_encoder(*files.arguments(output_dir=tmp_path / "output", onnx=True))
    assert done.error == (
        "onnx files need onnx, onnxscript, onnxruntime: pip install 'hf-lowrank[onnx]', as "
        "docs/serving.md says."
    )
    assert not (tmp_path / "output").exists()

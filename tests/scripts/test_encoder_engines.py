"""A compressed encoder in sentence-transformers and onnxruntime, where these are installed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_lowrank.inputs.encoders import load_encoder
from tests.scripts import ROOT, EncoderFiles, InProcess

USE = """
import sys
import torch
{imports}
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1]{arguments})
found = model.encode(["w01 w02 w03", "w04 w05"], convert_to_tensor=True)
print(found.norm(dim=1).tolist(), flush=True)
torch.save(found, sys.argv[2])
"""


@pytest.mark.parametrize("with_package", [True, False], ids=["with hf_lowrank", "without"])
def test_sentence_transformers_loads_it(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path, with_package: bool
):
    """In a process of its own; without hf_lowrank by the code beside the weights."""
    pytest.importorskip("sentence_transformers")
    output = tmp_path / "output"
    assert compress_encoder(*files.arguments(output_dir=output)).code == 0
    imports = "import hf_lowrank" if with_package else "sys.modules['hf_lowrank'] = None"
    code = USE.format(imports=imports, arguments="" if with_package else ", trust_remote_code=True")
    done = subprocess.run(
        [sys.executable, "-c", code, output, tmp_path / "found.pt"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens = AutoTokenizer.from_pretrained(output)(
        ["w01 w02 w03", "w04 w05"], padding=True, return_tensors="pt"
    )
    encoder = AutoModel.from_pretrained(output)
    with torch.no_grad():
        hidden = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert torch.allclose(torch.load(tmp_path / "found.pt"), wanted, atol=1e-5)


def test_onnx_files_give_the_same_embeddings(
    compress_encoder: InProcess, files: EncoderFiles, tmp_path: Path
):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    output = tmp_path / "output"
    done = compress_encoder(*files.arguments(output_dir=output, onnx_int8=True))
    assert done.code == 0, done.err
    texts = ["w01 w02 w03", "w04 w05", "w06"]
    tokens = AutoTokenizer.from_pretrained(output)(texts, padding=True, return_tensors="pt")
    encoder = load_encoder(str(files.model))
    model = AutoModel.from_pretrained(output).eval()
    with torch.no_grad():
        wanted = encoder.loss.embed(model, dict(tokens))
    for name, least in (("model.onnx", 0.99999), ("model_quint8.onnx", 0.9)):
        session = onnxruntime.InferenceSession(output / "onnx" / name)
        (found,) = session.run(
            ["sentence_embedding"], {key: value.numpy() for key, value in tokens.items()}
        )
        cosine = torch.nn.functional.cosine_similarity(torch.tensor(found), wanted)
        assert float(cosine.min()) > least, name

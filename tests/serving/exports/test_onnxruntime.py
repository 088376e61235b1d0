"""onnxruntime writes with exported checkpoints what transformers writes with them."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.serving.exports.checkpoints import EMBEDDINGS, ENCODER, LOW_RANK, SENTENCES

onnxruntime = pytest.importorskip("onnxruntime", reason="make test-exports installs it")
pytest.importorskip("onnxscript", reason="make test-exports installs it")


def written(session, prompt, count):
    """Greedy tokens, the prompt read in two parts, the second behind a cache."""
    shapes = {each.name: each.shape for each in session.get_inputs()}
    past = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past")
    }
    tokens, place = list(prompt), 0
    parts = [prompt[:5], prompt[5:]]
    while len(tokens) < len(prompt) + count:
        new = parts.pop(0) if parts else tokens[-1:]
        total = place + len(new)
        inputs = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(place, total)[None],
        }
        logits, *present = session.run(None, inputs | past)
        past, place = dict(zip(past, present, strict=True)), total
        if not parts:
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["plain_narrowed", *LOW_RANK])
def test_tokens_are_those_of_transformers(exported, name):
    folder, rows = exported(name, "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for row in rows:
        assert written(session, row["prompt"], len(row["tokens"])) == row["tokens"]


def test_embeddings_are_those_of_transformers(exported, checkpoints):
    folder, _ = exported(ENCODER, "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="np")
    (found,) = session.run(["sentence_embedding"], dict(tokens))
    wanted = torch.load(checkpoints / ENCODER / EMBEDDINGS)
    assert torch.allclose(torch.tensor(found), wanted, atol=1e-5)

"""OpenVINO writes with exported checkpoints what transformers writes with them."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.serving.exports.checkpoints import EMBEDDINGS, ENCODER, LOW_RANK, SENTENCES

pytest.importorskip("optimum.intel", reason="make test-exports installs it")
from optimum.intel import OVModelForCausalLM, OVModelForFeatureExtraction

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@pytest.mark.parametrize("name", ["plain_dense", "plain_narrowed", *LOW_RANK])
def test_tokens_are_those_of_transformers(exported, name):
    folder, rows = exported(name, "openvino")
    model = OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT)
    for row in rows:
        prompt = torch.tensor([row["prompt"]])
        count = len(row["tokens"])
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
        assert found[0, len(row["prompt"]) :].tolist() == row["tokens"]


def test_nothing_of_the_checkpoint_is_left_in_the_config(exported):
    folder, _ = exported("plain_narrowed", "openvino")
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & config.keys()


def test_embeddings_are_those_of_transformers(exported, checkpoints):
    folder, _ = exported(ENCODER, "openvino")
    model = OVModelForFeatureExtraction.from_pretrained(folder, ov_config=EXACT)
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    found = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    wanted = torch.load(checkpoints / ENCODER / EMBEDDINGS)
    assert torch.allclose(found, wanted, atol=1e-5)

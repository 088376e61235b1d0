"""A compressed model is served as any other: pipeline, chat, caches, beams, int8, ONNX."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, pipeline

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankLinear
from hf_lowrank.evaluation.int8 import quantize_int8_
from hf_lowrank.evaluation.size import model_sizes
from tests.scripts import save_checkpoint, word_tokenizer
from tests.tiny_models import logits, tiny_llama, token_batches

CHAT = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with its tokenizer, which has a chat template."""
    model = tiny_llama()
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    folder = save_checkpoint(tmp_path_factory.mktemp("served"), model)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> Any:
    return hf_lowrank.load(folder)


def greedy(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy continuation without any cache, one token after the other."""
    with torch.no_grad():
        for _ in range(new_tokens):
            following = model(ids, use_cache=False).logits[:, -1]
            following[:, model.config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, following.argmax(-1, keepdim=True)], dim=1)
    return ids


LENGTH = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def test_the_text_generation_pipeline_writes_what_the_model_writes(folder: Path, model: Any):
    writer = pipeline("text-generation", model=str(folder))
    assert any(isinstance(module, LowRankLinear) for module in writer.model.modules())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w01 w02 w03", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(greedy(model, ids, 8)[0, 3:], skip_special_tokens=True)
    written = writer("w01 w02 w03", return_full_text=False, **LENGTH)[0]["generated_text"]
    assert written.split() == expected.split()


def test_a_chat_template_and_the_pipeline_with_messages(folder: Path, model: Any):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "w05 w06"}]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, **LENGTH)
    assert torch.equal(output, greedy(model, inputs["input_ids"], 8))
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = writer(messages, **LENGTH)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    written = output[0, inputs["input_ids"].shape[1] :]
    assert answer["content"].split() == tokenizer.decode(written, True).split()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_do_not_change_what_is_written(model: Any, cache: str):
    ids = token_batches(1, length=7)[0]["input_ids"]
    options = {"disable_compile": True} if cache == "static" else {}
    output = model.generate(ids, cache_implementation=cache, **options, **LENGTH)
    assert torch.equal(output, greedy(model, ids, 8))


def test_left_padded_prompts_are_continued_as_they_are_alone(model: Any):
    long, short = token_batches(1, length=9)[0]["input_ids"]
    ids, mask = torch.stack([long, short]), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    output = model.generate(ids, attention_mask=mask, **LENGTH)
    assert torch.equal(output[:1], greedy(model, long[None], 8))
    assert torch.equal(output[1:, 4:], greedy(model, short[None, 4:], 8))


def sequence_score(model: Any, tokens: torch.Tensor, start: int) -> float:
    scores = logits(model, {"input_ids": tokens}).log_softmax(-1)[:, start - 1 : -1]
    return float(scores.gather(-1, tokens[:, start:, None]).sum())


def test_beams_find_a_likelier_text_than_greedy(model: Any):
    ids = token_batches(1, 1, 6)[0]["input_ids"]
    one = model.generate(ids, **LENGTH)
    beams = model.generate(ids, num_beams=8, return_dict_in_generate=True, output_scores=True,
                           length_penalty=0.0, **LENGTH)  # fmt: skip
    assert beams.sequences.shape == one.shape
    assert sequence_score(model, beams.sequences, 6) >= sequence_score(model, one, 6)
    assert not torch.equal(beams.sequences, one)


@pytest.mark.filterwarnings("ignore")
def test_the_compressed_model_drafts_for_the_dense_one(model: Any):
    dense, ids = tiny_llama(), token_batches(1, 1, 6)[0]["input_ids"]
    alone = dense.generate(ids, **LENGTH)
    assert torch.equal(dense.generate(ids, assistant_model=model, **LENGTH), alone)


@pytest.mark.filterwarnings("ignore")
def test_factors_in_int8_by_torchao(model: Any):
    pytest.importorskip("torchao.quantization")
    (batch,) = token_batches(1)
    before, size = logits(model, batch), model_sizes(model)[1]
    quantize_int8_(model)
    layer = next(m for m in model.modules() if isinstance(m, LowRankLinear))
    assert type(layer.lowrank_A.weight) is not torch.nn.Parameter
    assert type(model.get_output_embeddings().weight) is torch.nn.Parameter
    assert model_sizes(model)[1] < size
    after = logits(model, batch)
    assert 0 < float((after - before).abs().max()) < 0.5 * float(before.std())
    output = model.generate(batch["input_ids"], **LENGTH)
    assert output.shape[1] == batch["input_ids"].shape[1] + 8


class LogitsOnly(torch.nn.Module):
    """A model from token ids to logits, which is all that an exported graph has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_gives_the_same_logits(model: Any, tmp_path: Path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    ids = token_batches(1, length=12)[0]["input_ids"]
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        LogitsOnly(model).eval(), (ids,), path, dynamo=True,
        input_names=["input_ids"], output_names=["logits"],
    )  # fmt: skip
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    expected = logits(model, {"input_ids": ids})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)

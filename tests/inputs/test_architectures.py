"""Checkpoints read as what they are not: refused, or loaded with every part that they have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2DoubleHeadsModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import DataError
from hf_lowrank.inputs.sources import load_any_causal_lm, load_causal_lm, load_classifier
from tests.scripts import save_checkpoint
from tests.tiny_models import (
    VOCABULARY,
    build,
    equal_states,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_batches,
)

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def llama(model_class: Any, tied: bool = True, **changes: Any) -> Any:
    """A model of Llama's body whose embeddings are tied, so that no weight is missing."""
    return build(model_class, LlamaConfig(**TEXT, tie_word_embeddings=tied, **changes), 0)


def bert(model_class: Any) -> Any:
    settings = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    return build(model_class, BertConfig(**settings), 0)


def add_tensors(folder: Path, **extra: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})


def name_architecture(folder: Path, value: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"architectures": value}), "utf-8")


# Language models


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(LlamaForSequenceClassification),
        lambda: llama(LlamaForTokenClassification),
        lambda: llama(LlamaForQuestionAnswering),
        lambda: bert(BertForMaskedLM),
        lambda: build(GPT2DoubleHeadsModel, tiny_gpt2().config, 0),
        tiny_t5,
    ],
)
def test_a_checkpoint_with_another_head_is_no_language_model(tmp_path: Path, make: Any):
    model = make()
    save_checkpoint(tmp_path / "model", model)
    with pytest.raises(DataError) as caught:
        load_causal_lm(str(tmp_path / "model"))
    assert str(caught.value) == (
        f"{tmp_path / 'model'}: holds a {type(model).__name__}, not a causal language model, so "
        "its head would be lost; load it with its own class and give it to hf_lowrank.compress."
    )


@pytest.mark.parametrize("named", [None, ["LlamaForMyTask"], ["LlamaForCausalLM"], [], "x"])
def test_a_head_that_the_config_does_not_name_shows_in_the_tensors(tmp_path: Path, named: object):
    folder = save_checkpoint(tmp_path / "model", llama(LlamaForSequenceClassification))
    name_architecture(folder, named)
    with pytest.raises(DataError) as caught:
        load_causal_lm(str(folder))
    assert str(caught.value).startswith(str(folder))
    if named != "x":
        assert str(caught.value) == (
            f"{folder}: LlamaForCausalLM has no place for 1 of its tensors, for example "
            "score.weight, which would be lost; load it with the class that saved it and give it "
            "to hf_lowrank.compress."
        )


def test_a_value_head_beside_a_language_model_is_not_dropped(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model")
    add_tensors(folder, **{"v_head.summary.weight": torch.ones(1, 32)})
    with pytest.raises(DataError, match=r"1 of its tensors, for example v_head\.summary\.weight"):
        load_causal_lm(str(folder))


def test_a_body_whose_head_is_not_tied_has_no_head(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model", llama(LlamaModel, tied=False))
    with pytest.raises(
        DataError, match=r"no weights for 1 parameters, for example lm_head\.weight"
    ):
        load_causal_lm(str(folder))


def test_a_body_whose_head_is_its_embeddings_is_a_language_model(tmp_path: Path):
    body = llama(LlamaModel)
    model, _ = load_causal_lm(str(save_checkpoint(tmp_path / "model", body)))
    assert equal_states(model.model.state_dict(), body.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        (tiny_llama, ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        (tiny_gpt2, ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
    ],
)
def test_buffers_of_old_checkpoints_may_be_left_over(tmp_path: Path, model: Any, extra: list[str]):
    folder = save_checkpoint(tmp_path / "model", model())
    add_tensors(folder, **{name: torch.ones(4) for name in extra})
    assert equal_states(load_causal_lm(str(folder))[0].state_dict(), model().state_dict())


def test_a_compressed_classifier_is_no_language_model_either(tmp_path: Path):
    model = llama(LlamaForSequenceClassification)
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    folder = save_checkpoint(tmp_path / "model", model)
    with pytest.raises(DataError, match="holds a LlamaForSequenceClassification, not a causal"):
        load_any_causal_lm(str(folder))


# Classifiers


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: llama(LlamaForTokenClassification), "LlamaForTokenClassification"),
        (lambda: bert(BertForTokenClassification), "BertForTokenClassification"),
        (lambda: llama(LlamaForCausalLM), "LlamaForCausalLM"),
    ],
)
def test_a_checkpoint_with_another_head_is_no_classifier(tmp_path: Path, make: Any, name: str):
    folder = save_checkpoint(tmp_path / "model", make())
    with pytest.raises(DataError, match=f"holds a {name}, not a sequence classifier, so its head"):
        load_classifier(str(folder), 2)


def test_a_classifier_keeps_no_tensor_of_another_head(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "model", tiny_bert_classifier())
    add_tensors(folder, **{"qa_outputs.weight": torch.ones(2, 32)})
    num_labels = tiny_bert_classifier().config.num_labels
    with pytest.raises(DataError, match=r"for example qa_outputs\.weight, which would be lost"):
        load_classifier(str(folder), num_labels)


def test_a_compressed_language_model_is_no_classifier(tmp_path: Path):
    model = tiny_llama()
    hf_lowrank.compress(model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False)
    folder = save_checkpoint(tmp_path / "model", model)
    with pytest.raises(DataError, match="holds a LlamaForCausalLM, not a sequence classifier"):
        load_classifier(str(folder), 2)


def test_a_classifier_that_is_one_loads_as_it_is(tmp_path: Path):
    model = tiny_bert_classifier()
    folder = save_checkpoint(tmp_path / "model", model)
    found = load_classifier(str(folder), model.config.num_labels)
    assert equal_states(found.state_dict(), model.state_dict())


# Models with a vision tower


def gemma3() -> Any:
    config = Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 16},
        vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    return build(Gemma3ForConditionalGeneration, config, 0)


def llava() -> Any:
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=90,
    )
    return build(LlavaForConditionalGeneration, config, 0)


@pytest.mark.parametrize("make", [gemma3, llava])
def test_the_text_tower_is_compressed_and_the_rest_stays(tmp_path: Path, make: Any):
    dense = make()
    folder = save_checkpoint(tmp_path / "dense", dense)
    model, tokenizer = load_causal_lm(str(folder))
    assert type(model) is type(dense)
    assert equal_states(model.state_dict(), dense.state_dict())
    texts = token_batches(4)
    report = hf_lowrank.compress(
        model, LowRankConfig(param_ratio=0.6), texts, texts, progress=False
    )
    assert report.ranks
    assert all(".language_model." in name for name in report.ranks)
    towers = [name for name in dense.state_dict() if ".language_model." not in name]
    assert any("vision_tower" in name for name in towers)
    assert all(torch.equal(model.state_dict()[n], dense.state_dict()[n]) for n in towers)
    assert {reason for name, reason in report.failures.items() if "vision_tower" in name} == {
        "the first batch does not call it"
    }

    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    again, _ = load_any_causal_lm(str(tmp_path / "small"))
    assert type(again) is type(dense)
    with torch.no_grad():
        for batch in texts:
            assert torch.equal(again(**batch).logits, model(**batch).logits)

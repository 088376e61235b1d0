"""Losses of models that transformers' lists of names do not have: subclasses and wrappers."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BertForQuestionAnswering,
    GenerationMixin,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_lowrank.errors import ConfigError
from hf_lowrank.measuring.causal import hidden_states
from hf_lowrank.measuring.items import is_causal_lm
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.training.base import CheckedTrainer
from tests.measuring.losses import causal_batch, mean_of, sentences, tiny_bert, tiny_gemma2
from tests.tiny_models import (
    LLAMA_LIKE,
    build,
    tiny_bert_classifier,
    tiny_llama,
    tiny_t5,
    token_batches,
)


class OwnLlama(LlamaForCausalLM):
    pass


class OwnReader(BertForQuestionAnswering):
    pass


def subclassed(model):
    own = copy.deepcopy(model)
    own.__class__ = type("Own", (type(model),), {})
    return own


def compiled(model):
    return torch.compile(model, backend="eager")


def adapted(model):
    """With a fresh adapter, which changes nothing yet."""
    return get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))


def compiled_with_adapter(model):
    return compiled(adapted(model))


WRAPPERS = [subclassed, compiled, adapted, compiled_with_adapter]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_the_loss_is_that_of_the_model_inside(make, wrap):
    model, batch = make(), causal_batch("labels")
    inside, found = item_losses(model, batch), item_losses(wrap(model).eval(), batch)
    assert torch.equal(found.counts, inside.counts)
    torch.testing.assert_close(found.sums, inside.sums)


def test_a_subclass_has_the_loss_of_its_own_forward_pass():
    model, batch = build(OwnLlama, tiny_llama().config, 0), causal_batch("labels")
    found = item_losses(model, batch)
    own = model(**batch).loss
    assert mean_of(found).item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_kinds_are_those_of_the_model_inside(wrap):
    assert is_causal_lm(wrap(tiny_llama()))
    assert not is_causal_lm(wrap(tiny_bert_classifier()))
    assert not is_causal_lm(wrap(tiny_t5()))


def test_an_adapter_counts_in_the_loss_and_in_the_hidden_states():
    model, batch = tiny_llama(tie_word_embeddings=False), causal_batch("tokens")
    settings = LoraConfig(target_modules=["up_proj", "lm_head"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model), settings).eval()
    found, states = item_losses(wrapped, batch), hidden_states(wrapped, batch)
    plain = copy.deepcopy(wrapped).merge_and_unload()
    torch.testing.assert_close(found.sums, item_losses(plain, batch).sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, hidden_states(plain, batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.sums, item_losses(model, batch).sums, rtol=1e-2)


def test_what_a_wrapper_adds_to_the_input_is_not_left_out():
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = get_peft_model(tiny_llama(), settings).eval()
    with pytest.raises(ConfigError, match="head applied to the last hidden states"):
        hidden_states(wrapped, causal_batch("tokens"))


def test_a_subclass_that_answers_questions_is_scored_by_its_spans():
    model = tiny_bert(BertForQuestionAnswering)
    positions = torch.tensor([1, 0, 7, 4])
    batch = sentences(start_positions=positions, end_positions=positions)
    own = tiny_bert(OwnReader)
    own.load_state_dict(model.state_dict())
    assert torch.equal(item_losses(own, batch).sums, item_losses(model, batch).sums)


def test_a_model_that_also_reads_images_has_the_loss_of_its_own_forward_pass():
    text = {**LLAMA_LIKE, "model_type": "llama"}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    model, batch = build(LlavaForConditionalGeneration, config, 0), causal_batch("labels")
    own = model(**batch).loss
    assert mean_of(item_losses(model, batch)).item() == pytest.approx(own.item(), rel=1e-5)


class Writer(LlamaPreTrainedModel, GenerationMixin):
    """Writes text, and no list of transformers knows its kind."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.post_init()


@pytest.mark.parametrize("source", ["data", "model"])
@pytest.mark.parametrize("labels", [True, False])
def test_other_models_that_write_text_are_refused_not_scored_unshifted(source, labels):
    model, batch = build(Writer, tiny_llama().config, 0), token_batches(1)[0]
    if labels:
        batch["labels"] = batch["input_ids"]
    message = r"^Writer writes text, but .*; pass a loss_function\.$"
    with pytest.raises(ConfigError, match=message):
        item_losses(model, batch, source)


def test_the_trainer_knows_a_wrapped_language_model(tmp_path):
    """A classifier's loss is not normalised by the number of its items."""
    for model, accepts in ((adapted(tiny_llama()), True), (adapted(tiny_bert_classifier()), False)):
        assert isinstance(model, nn.Module)
        assert CheckedTrainer(model).model_accepts_loss_kwargs is accepts

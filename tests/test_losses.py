"""Losses and their gradients against the models' own, for every kind of head."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from hf_lowrank import losses
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.losses import (
    IGNORED,
    distillation_losses,
    forward_body,
    hidden_states,
    is_causal_lm,
    is_encoder_decoder,
    item_losses,
    prepare_losses,
)
from tiny_models import (
    HIDDEN,
    LLAMA_LIKE,
    VOCABULARY,
    build,
    sentence_batches,
    seq2seq_batches,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    token_batches,
)


def tiny_gemma2():
    """Logits soft-capped at 2."""
    config = Gemma2Config(
        **LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0
    )
    return build(Gemma2ForCausalLM, config, 0)


def tiny_granite():
    """Logits divided by 4."""
    return build(GraniteForCausalLM, GraniteConfig(**LLAMA_LIKE, logits_scaling=4.0), 0)


def tiny_cohere():
    """Logits multiplied by 1/4."""
    return build(CohereForCausalLM, CohereConfig(**LLAMA_LIKE, logit_scale=0.25), 0)


def tiny_bert(model_class, **changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        **changes,
    }
    return build(model_class, BertConfig(**settings), 0)


def tiny_bert_decoder():
    """A causal language model with a transform between hidden states and head."""
    return tiny_bert(BertLMHeadModel, is_decoder=True)


PLAIN_HEADS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}
CHANGED_LOGITS = {
    "gemma2": tiny_gemma2,
    "granite": tiny_granite,
    "cohere": tiny_cohere,
    "bert_decoder": tiny_bert_decoder,
}


def causal_batch(kind, batch_size=3, length=16):
    """Tokens of three sequences, with what `kind` adds to them."""
    batch = token_batches(1, batch_size, length, seed=5)[0]
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    if kind == "tokens":
        return {"input_ids": tokens}
    if kind == "right padding":
        tokens[1, -5:], mask[1, -5:] = 0, 0
    if kind == "left padding":
        tokens[2, :4], mask[2, :4] = 0, 0
    if kind == "labels":
        labels = tokens.clone()
        labels[0, 3:7], labels[2, :9], labels[1, -1] = IGNORED, IGNORED, IGNORED
        return {**batch, "labels": labels}
    return batch


def own_loss(model, batch):
    """(mean loss by the model's own forward pass, scored positions).

    Neither padding nor what follows it is scored: the first token after padding on the left has
    nothing before it to be predicted from.
    """
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = IGNORED
            labels[:, 1:][batch["attention_mask"][:, :-1] == 0] = IGNORED
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, labels=labels).loss, int((labels[:, 1:] != IGNORED).sum())


def mean_of(result):
    return result.sums.sum() / result.counts.sum()


def body_gradients(model, loss):
    """Gradients by the matrices between embeddings and head."""
    body = {
        name: parameter
        for name, parameter in model.base_model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name
    }
    found = torch.autograd.grad(loss, list(body.values()), allow_unused=True)
    return {name: grad for name, grad in zip(body, found, strict=True) if grad is not None}


def assert_same_loss_and_gradient(model, found, wanted):
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    found_gradients, wanted_gradients = (body_gradients(model, loss) for loss in (found, wanted))
    assert wanted_gradients
    assert found_gradients.keys() == wanted_gradients.keys()
    assert max(float(gradient.abs().max()) for gradient in wanted_gradients.values()) > 1e-3
    for name, gradient in wanted_gradients.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(found_gradients[name], gradient, atol=1e-4 * scale + 1e-8), name


KINDS = ["tokens", "no padding", "right padding", "left padding", "labels"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*PLAIN_HEADS, *CHANGED_LOGITS])
def test_causal_loss_and_gradient_are_the_models_own(name, kind):
    model = (PLAIN_HEADS | CHANGED_LOGITS)[name]()
    batch = causal_batch(kind)
    result = item_losses(model, batch)
    wanted, positions = own_loss(model, batch)
    assert int(result.counts.sum()) == positions
    assert_same_loss_and_gradient(model, mean_of(result), wanted)


@pytest.mark.parametrize("name", PLAIN_HEADS)
@pytest.mark.parametrize("kind", ["right padding", "labels"])
@pytest.mark.parametrize("slice_tokens", [1, 5, 16, 47, 48, 49])
def test_slices_add_up_to_the_whole(monkeypatch, name, kind, slice_tokens):
    monkeypatch.setattr(losses, "SLICE_TOKENS", slice_tokens)
    model, batch = PLAIN_HEADS[name](), causal_batch(kind)
    wanted, _ = own_loss(model, batch)
    assert_same_loss_and_gradient(model, mean_of(item_losses(model, batch)), wanted)


def test_a_sequence_longer_than_a_slice():
    model = tiny_llama(max_position_embeddings=1024)
    batch = token_batches(1, 1, losses.SLICE_TOKENS + 70)[0]
    wanted, _ = own_loss(model, batch)
    assert_same_loss_and_gradient(model, mean_of(item_losses(model, batch)), wanted)


@pytest.mark.parametrize("grad", [True, False])
def test_the_head_never_sees_more_than_one_slice(monkeypatch, grad):
    monkeypatch.setattr(losses, "SLICE_TOKENS", 7)
    model, batch = tiny_llama(), causal_batch("no padding")
    prepare_losses(model, batch)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda *call: sizes.append(len(call[-1])))
    with torch.set_grad_enabled(grad):
        item_losses(model, batch)
    handle.remove()
    assert sizes == [7] * 6 + [6]


def test_slices_without_a_label_are_skipped(monkeypatch):
    monkeypatch.setattr(losses, "SLICE_TOKENS", 4)
    model, batch = tiny_llama(), causal_batch("no padding")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[1, 6] = 9  # the target of position 16 + 5, in the sixth slice
    prepare_losses(model, batch)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *call: calls.append(len(call[-1])))
    result = item_losses(model, {**batch, "labels": labels})
    handle.remove()
    assert calls == [4]
    assert result.counts.tolist() == [0, 1, 0]
    assert result.sums[[0, 2]].tolist() == [0.0, 0.0]
    assert result.sums[1] > 0


def test_items_are_kept_apart_in_value_and_gradient():
    model, batch = tiny_llama(), causal_batch("right padding")
    result = item_losses(model, batch)
    assert result.counts.tolist() == [15, 10, 15]
    for index in range(3):
        single = {name: value[index : index + 1] for name, value in batch.items()}
        wanted, positions = own_loss(model, single)
        assert result.sums[index].item() == pytest.approx(wanted.item() * positions, rel=1e-5)
    weights = torch.tensor([0.5, -2.0, 0.0])
    parts = [
        own_loss(model, {k: v[i : i + 1] for k, v in batch.items()})[0] * n
        for i, n in enumerate((15, 10, 15))
    ]
    wanted = (weights * torch.stack(parts)).sum()
    assert_same_loss_and_gradient(model, (weights * result.sums).sum(), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_losses_without_gradient_are_the_same(name):
    model, batch = (PLAIN_HEADS | CHANGED_LOGITS)[name](), causal_batch("labels")
    with torch.no_grad():
        result = item_losses(model, batch)
    assert not result.sums.requires_grad
    assert torch.allclose(result.sums, item_losses(model, batch).sums.detach(), rtol=1e-6)


@pytest.mark.parametrize("name", CHANGED_LOGITS)
def test_what_a_model_does_to_its_logits_matters(name):
    """So that the tests above would notice if it were left out."""
    model, batch = CHANGED_LOGITS[name](), causal_batch("tokens")
    hidden = model.base_model(**batch)[0]
    raw = model.get_output_embeddings()(hidden)[:, :-1]
    targets = batch["input_ids"][:, 1:]
    without = F.cross_entropy(raw.flatten(0, 1), targets.flatten())
    assert abs((without - own_loss(model, batch)[0]).item()) > 0.05


def test_a_change_of_small_logits_is_not_overlooked():
    """A soft cap at 30 hardly shows while the logits are small, but it does once they grow."""
    model, batch = tiny_gemma2(), causal_batch("tokens")
    model.config.final_logit_softcapping = 30.0
    prepare_losses(model, batch)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    wanted, _ = own_loss(model, batch)
    assert mean_of(item_losses(model, batch)).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_losses_of_a_bfloat16_model_are_summed_in_fp32():
    model = tiny_llama().bfloat16()
    batch = causal_batch("no padding")
    result = item_losses(model, batch)
    assert result.sums.dtype == torch.float32
    logits = model(**batch).logits.float()[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert mean_of(result).item() == pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "columns"),
    [(torch.tensor([0.3]), 1), (torch.tensor([2]), 3), (torch.tensor([[1.0, 0.0, 1.0]]), 3)],
    ids=["regression", "classification", "multi-label"],
)
def test_losses_of_bfloat16_sentences_are_computed_in_fp32(labels, columns):
    logits = torch.tensor([[7.03125, -3.015625, 0.5][:columns]])
    wanted = item_losses(Logits(), {"logits": logits, "labels": labels}).sums
    found = item_losses(Logits(), {"logits": logits.bfloat16(), "labels": labels}).sums
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_distillation_of_a_bfloat16_model_is_computed_in_fp32():
    model, batch = tiny_llama().bfloat16(), causal_batch("no padding")
    teacher = hidden_states(model, batch).detach().roll(1, dims=0)
    student_logs = model(**batch).logits.float()[:, :-1].log_softmax(dim=-1)
    teacher_logs = model.lm_head(teacher).float()[:, :-1].log_softmax(dim=-1)
    wanted = F.kl_div(student_logs, teacher_logs, reduction="none", log_target=True).sum((1, 2))
    found = distillation_losses(model, batch, teacher, 1.0).sums
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_what_is_found_out_about_a_model_is_found_out_once():
    model, batch = tiny_llama(), causal_batch("tokens")
    prepare_losses(model, batch)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *call: calls.append(1))
    item_losses(model, batch)
    item_losses(model, batch)
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_body_alone_is_run_where_the_head_is_last(name):
    model, batch = PLAIN_HEADS[name](), causal_batch("labels")
    prepare_losses(model, batch)
    seen = []
    handles = [
        module.register_forward_hook(lambda module, *rest: seen.append(module))
        for module in (model.base_model, model.lm_head)
    ]
    with torch.no_grad():
        forward_body(model, batch)
    for handle in handles:
        handle.remove()
    assert seen == [model.base_model]


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_t5, tiny_bert_classifier])
def test_the_whole_model_is_run_where_it_has_to_be(make):
    model = make()
    batch = {
        tiny_gemma2: causal_batch("labels"),
        tiny_t5: seq2seq_batches(1)[0],
        tiny_bert_classifier: sentence_batches(1)[0],
    }[make]
    prepare_losses(model, batch)
    seen = []
    handle = model.register_forward_hook(lambda *call: seen.append(1))
    with torch.no_grad():
        forward_body(model, batch)
    handle.remove()
    assert seen == [1]


def test_kinds_of_models():
    assert is_causal_lm(tiny_llama())
    assert is_causal_lm(tiny_gpt2())
    assert not is_causal_lm(tiny_bert_classifier())
    assert not is_causal_lm(tiny_t5())
    assert not is_causal_lm(nn.Linear(2, 2))
    assert is_encoder_decoder(tiny_t5())
    assert not is_encoder_decoder(tiny_llama())
    assert not is_encoder_decoder(nn.Linear(2, 2))


def sentences(**labels):
    return {**token_batches(1, 4, 12, padding=3, seed=2)[0], **labels}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def token_labels(number):
    labels = torch.randint(0, number, (4, 12), generator=generator())
    labels[-1, -3:], labels[0, :4] = IGNORED, IGNORED
    return labels


def heads():
    """Name: (model, batch, scored positions of each item)."""
    ones = [1] * 4
    values = torch.randn(4, generator=generator())
    several = torch.randint(0, 2, (4, 3), generator=generator()).float()
    positions = torch.tensor([1, 0, 7, 4])
    seq2seq = seq2seq_batches(1, 4)[0]
    seq2seq["labels"][1, 6:] = IGNORED
    choices = {
        name: value.view(2, 2, 12) for name, value in sentences().items() if value.shape == (4, 12)
    }
    sequence = BertForSequenceClassification
    return {
        "classification": (tiny_bert_classifier(), sentence_batches(1)[0], ones),
        "regression": (tiny_bert(sequence, num_labels=1), sentences(labels=values), ones),
        "regression column": (
            tiny_bert(sequence, num_labels=1),
            sentences(labels=values[:, None]),
            ones,
        ),
        "multi-label": (
            tiny_bert(sequence, num_labels=3, problem_type="multi_label_classification"),
            sentences(labels=several),
            ones,
        ),
        "tokens": (
            tiny_bert(BertForTokenClassification, num_labels=5),
            sentences(labels=token_labels(5)),
            [8, 12, 12, 9],
        ),
        "masked lm": (
            tiny_bert(BertForMaskedLM),
            sentences(labels=token_labels(VOCABULARY)),
            [8, 12, 12, 9],
        ),
        "span": (
            tiny_bert(BertForQuestionAnswering),
            sentences(start_positions=positions, end_positions=positions + 3),
            ones,
        ),
        "choice": (
            tiny_bert(BertForMultipleChoice),
            {**choices, "labels": torch.tensor([1, 0])},
            [1, 1],
        ),
        "seq2seq": (tiny_t5(), seq2seq, [10, 6, 10, 10]),
    }


HEADS = list(heads())


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradient_of_a_head_are_the_models_own(name):
    model, batch, counts = heads()[name]
    result = item_losses(model, batch)
    assert result.sums.dtype == torch.float32
    assert result.sums.shape == result.counts.shape
    assert result.counts.tolist() == counts
    assert_same_loss_and_gradient(model, mean_of(result), model(**batch).loss)


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_of_a_head_is_its_items(name):
    model, batch, _ = heads()[name]
    together = item_losses(model, batch)
    for index in range(len(together.sums)):
        single = item_losses(model, {k: v[index : index + 1] for k, v in batch.items()})
        assert single.sums.item() == pytest.approx(together.sums[index].item(), rel=1e-4)
        assert int(single.counts) == int(together.counts[index])


@pytest.mark.parametrize("labels", ["several labels", "several values"])
def test_labels_tell_the_task_where_the_config_does_not(labels):
    """Transformers' own rule where `problem_type` is not set or says regression."""
    problem = None if labels == "several labels" else "regression"
    values = torch.randint(0, 2, (4, 3), generator=generator()).float()
    if problem:
        values = torch.randn(4, 3, generator=generator())
    model = tiny_bert(BertForSequenceClassification, num_labels=3, problem_type=problem)
    batch = sentences(labels=values)
    found = mean_of(item_losses(model, batch))
    assert found.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("given", ["start_positions", "end_positions", None])
def test_missing_positions_are_named(given):
    batch = sentences(**({given: torch.tensor([1, 0, 7, 4])} if given else {}))
    message = (
        r"^The batches have no start_positions and end_positions, which BertForQuestionAnswering "
        r"needs; add them or set label_source='model'\.$"
    )
    with pytest.raises(DataError, match=message):
        item_losses(tiny_bert(BertForQuestionAnswering), batch)


def test_a_span_outside_the_text_is_ignored_like_in_the_models_own_loss():
    model = tiny_bert(BertForQuestionAnswering)
    outside = torch.tensor([1, 12, 7, 40])
    batch = sentences(start_positions=outside, end_positions=outside)
    inside = {name: value[[0, 2]] for name, value in batch.items()}
    found, wanted = item_losses(model, batch), item_losses(model, inside)
    assert torch.allclose(found.sums[[0, 2]], wanted.sums, rtol=1e-5)
    assert found.sums[[1, 3]].tolist() == [0.0, 0.0]


def test_missing_labels_are_named():
    message = r"^The batches have no 'labels', which BertForSequenceClassification needs; add them"
    with pytest.raises(DataError, match=f"{message} or set label_source='model'."):
        item_losses(tiny_bert_classifier(), sentences())


@pytest.mark.parametrize("label_source", ["data", "model"])
def test_a_model_that_cannot_sample_all_its_labels_is_not_told_to(label_source):
    """The decoder's inputs are made from the labels."""
    message = r"^The batches have no 'labels', which T5ForConditionalGeneration needs; add them\.$"
    with pytest.raises(DataError, match=message):
        item_losses(tiny_t5(), sentences(), label_source=label_source)


@pytest.mark.parametrize("label_source", ["data", "model"])
def test_a_model_without_head_is_refused(label_source):
    batch = sentences(labels=torch.zeros(4, dtype=torch.long))
    message = "^BertModel returns no logits, so it has no loss; load the model with its task head"
    with pytest.raises(ConfigError, match=message):
        item_losses(tiny_bert(BertModel), batch, label_source=label_source)


class Logits(nn.Module):
    """A model that answers with the logits it is given."""

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)

    def forward(self, logits, attention_mask=None):
        return SimpleNamespace(logits=logits)


ROWS = 20_000


def sampled(logits, **config):
    """Losses of many rows with the same logits, labels drawn by the model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = {"logits": torch.tensor(logits).expand(ROWS, -1)}
        return item_losses(Logits(**config), batch, label_source="model").sums


def test_sampled_classes_follow_the_predictions():
    probabilities = torch.tensor([0.6, 0.3, 0.08, 0.02])
    found = sampled((probabilities.log() + 3).tolist())
    for probability in probabilities:
        drawn = torch.isclose(found, -probability.log(), atol=1e-4).float().mean()
        spread = (probability * (1 - probability) / ROWS).sqrt()
        assert abs(drawn - probability) < 4 * spread


def test_sampled_values_make_the_squared_gradient_the_second_derivative():
    found = sampled([1.5])
    assert float(found.mean()) == pytest.approx(0.5, abs=0.025)
    # The gradient of the squared error e^2 is 2 e; its mean square must be 2, as (e^2)'' is.
    assert float((4 * found).mean()) == pytest.approx(2.0, abs=0.1)


def test_sampled_label_sets_follow_the_predictions():
    found = sampled([2.0, -1.0], problem_type="multi_label_classification")
    p, q = torch.tensor(2.0).sigmoid(), torch.tensor(-1.0).sigmoid()
    for first, second, probability in (
        (p, q, p * q),
        (p, 1 - q, p * (1 - q)),
        (1 - p, q, (1 - p) * q),
        (1 - p, 1 - q, (1 - p) * (1 - q)),
    ):
        loss = -(first.log() + second.log()) / 2
        drawn = torch.isclose(found, loss, atol=1e-5).float().mean()
        assert abs(drawn - probability) < 4 * (probability * (1 - probability) / ROWS).sqrt()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_sampled_next_tokens_leave_padding_out(name):
    model, batch = (PLAIN_HEADS | CHANGED_LOGITS)[name](), causal_batch("right padding")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn, again = (item_losses(model, batch, label_source="model") for _ in range(2))
    from_data = item_losses(model, batch)
    assert drawn.counts.tolist() == from_data.counts.tolist() == [15, 10, 15]
    assert not torch.allclose(drawn.sums, from_data.sums)
    assert not torch.allclose(drawn.sums, again.sums)


def test_sampled_next_tokens_score_near_the_entropy():
    model, batch = tiny_llama(), token_batches(1, 16, 40)[0]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        logs = model(**batch).logits[:, :-1].log_softmax(dim=-1)
        entropy = float(-(logs.exp() * logs).sum(dim=-1).mean())
        drawn = float(mean_of(item_losses(model, batch, label_source="model")))
        from_data = float(mean_of(item_losses(model, batch)))
    assert abs(from_data - entropy) > 0.3
    assert drawn == pytest.approx(entropy, abs=0.15)


def test_sampled_token_labels_leave_padding_out():
    model = tiny_bert(BertForTokenClassification, num_labels=5)
    result = item_losses(model, sentences(), label_source="model")
    assert result.counts.tolist() == [12, 12, 12, 9]
    assert (result.sums > 0).all()


def test_labels_can_be_sampled_with_and_without_a_mask():
    batch = {"input_ids": sentences()["input_ids"]}
    model = tiny_bert(BertForTokenClassification, num_labels=5)
    assert item_losses(model, batch, label_source="model").counts.tolist() == [12] * 4
    for given in (batch, sentences()):
        result = item_losses(tiny_bert_classifier(), given, label_source="model")
        assert result.counts.tolist() == [1] * 4


def test_sampled_translations_keep_their_length():
    model, batch, counts = heads()["seq2seq"]
    result = item_losses(model, batch, label_source="model")
    assert result.counts.tolist() == counts
    assert not torch.allclose(result.sums, item_losses(model, batch).sums)


def test_sampled_spans_are_not_those_of_the_data():
    model, batch, _ = heads()["span"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = item_losses(model, batch, label_source="model").sums
    assert drawn.shape == (4,)
    assert not torch.allclose(drawn, item_losses(model, batch).sums)


def test_spans_can_be_sampled_without_positions():
    batch = sentences()
    result = item_losses(tiny_bert(BertForQuestionAnswering), batch, label_source="model")
    assert result.counts.tolist() == [1, 1, 1, 1]
    assert result.sums.isfinite().all()


def test_sampled_labels_are_held_constant_in_the_gradient():
    logits = torch.tensor([[1.0, -0.5, 0.3]]).repeat(6, 1).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        result = item_losses(Logits(), {"logits": logits}, label_source="model")
    (gradient,) = torch.autograd.grad(result.sums.sum(), logits)
    softmax = logits.detach().softmax(dim=-1)
    drawn = (softmax - gradient).round().argmax(dim=-1)
    assert len(set(drawn.tolist())) > 1
    assert torch.allclose(gradient, softmax - F.one_hot(drawn, 3), atol=1e-6)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("slice_tokens", [5, 512])
def test_distillation_mixes_labels_and_teacher(monkeypatch, kl_weight, slice_tokens):
    monkeypatch.setattr(losses, "SLICE_TOKENS", slice_tokens)
    model, batch = tiny_llama(), causal_batch("right padding")
    teacher = torch.randn(3, 16, HIDDEN, generator=generator())
    student_logs = model(**batch).logits[:, :-1].log_softmax(dim=-1)
    teacher_logs = model.lm_head(teacher)[:, :-1].detach().log_softmax(dim=-1)
    kept = batch["attention_mask"][:, 1:].bool()
    likelihood = -student_logs.gather(2, batch["input_ids"][:, 1:, None])[..., 0][kept].sum()
    divergence = (teacher_logs.exp() * (teacher_logs - student_logs)).sum(dim=-1)[kept].sum()
    assert abs((likelihood - divergence).item()) > 1
    wanted = (1 - kl_weight) * likelihood + kl_weight * divergence
    result = distillation_losses(model, batch, teacher, kl_weight)
    assert result.counts.tolist() == [15, 10, 15]
    assert_same_loss_and_gradient(model, result.sums.sum(), wanted)


def test_the_teacher_that_is_the_student_teaches_nothing():
    model, batch = tiny_llama(), causal_batch("labels")
    teacher = hidden_states(model, batch).detach()
    assert teacher.shape == (3, 16, HIDDEN)
    result = distillation_losses(model, batch, teacher, 1.0)
    assert result.sums.abs().max() < 1e-4
    assert distillation_losses(model, batch, teacher.flip(0), 1.0).sums.max() > 1


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_bert_classifier])
def test_distillation_needs_a_head_that_is_last(make):
    model = make()
    message = f"^{type(model).__name__}: distillation needs a causal language model whose logits"
    with pytest.raises(ConfigError, match=message):
        hidden_states(model, causal_batch("tokens"))

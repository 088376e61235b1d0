"""Models whose layers with a rank are stored in the compact form, which is the default."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig, compress, merge
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.forms.compact import CompactLinear
from hf_lowrank.format.rebuild import factorized_layers
from tests.tiny_models import (
    batches_for,
    logits,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_batches,
    written_batches,
)

pytestmark = pytest.mark.default_recipe
(BATCH,) = token_batches(1)


def cut(model, batches, **settings):
    config = LowRankConfig(**{"param_ratio": 0.6, "channels": False, **settings})
    return compress(model, config, batches, progress=False)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert_classifier, tiny_t5])
def test_the_size_counts_what_is_stored(make):
    model = make()
    report = cut(model, batches_for(model, 4))
    layers = factorized_layers(model)
    assert layers
    assert all(isinstance(layer, CompactLinear) for layer in layers.values())
    stored = 0
    for name in report.ranks:
        parameters = model.get_submodule(name).parameters()
        stored += sum(weight.numel() for weight in parameters if weight.ndim == 2)
    sizes = report.parameters
    assert sizes.targeted_kept == stored
    assert 0.6 * sizes.targeted_dense - 200 < stored <= 0.6 * sizes.targeted_dense
    assert report.config.others["form"] == "compact"


def test_the_form_changes_no_output_beyond_rounding(text):
    """The same ranks, stored either way."""
    config = {"metric": "kfac", "measured_prices": False}
    compact, factors = tiny_llama(), tiny_llama()
    ranks = cut(compact, text[:4], **config).ranks
    record = LowRankConfig(ranks=dict(ranks), form="factors")
    compress(factors, record, text[:4], progress=False)
    assert {layer.form for layer in factorized_layers(factors).values()} == {"factors"}
    torch.testing.assert_close(logits(compact, BATCH), logits(factors, BATCH), atol=1e-4, rtol=1e-3)


def test_a_budget_keeps_more_of_the_model_than_two_factors(text):
    rises = {
        form: cut(tiny_llama(), text[:4], form=form, measured_prices=False)
        for form in ("factors", "compact")
    }
    predicted = {form: report.predicted_loss_difference for form, report in rises.items()}
    assert predicted["compact"] < 0.8 * predicted["factors"]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_saved_loaded_trained_and_merged(make, tmp_path):
    model = make()
    cut(model, batches_for(model, 4), channels=True, param_ratio=0.7)
    wanted = logits(model, BATCH)
    model.save_pretrained(tmp_path)
    for loaded in (hf_lowrank.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded, BATCH), wanted)
        loaded(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    torch.testing.assert_close(logits(merge(loaded), BATCH), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["factors", "lora"])
def test_recovery_trains_it(kind):
    model = tiny_llama()
    text = written_batches(model, 18)
    config = LowRankConfig(param_ratio=0.5, channels=False, measured_prices=False)
    report = compress(
        model,
        config,
        text[:12],
        held_out=text[12:],
        recover=kind,
        recover_steps=12,
        progress=False,
    )
    assert report.recovery is not None
    assert report.recovery.loss_after < report.recovery.loss_before
    assert {layer.form for layer in factorized_layers(model).values()} == {"compact"}


def test_a_rank_fixed_at_the_full_rank_is_the_dense_layer(text):
    model = tiny_llama()
    report = cut(model, text[:4], rank_pattern={"q_proj": 32, "k_proj": 7})
    found = {name.rsplit(".", 1)[1]: rank for name, rank in report.ranks.items()}
    assert found["q_proj"] is None
    assert found["k_proj"] == 7


def test_from_pretrained_compresses_to_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = LowRankConfig(rank=5, metric="plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    layers = factorized_layers(model)
    assert {layer.rank for layer in layers.values()} == {5}
    assert all(isinstance(layer, CompactLinear) for layer in layers.values())


def test_the_training_form_is_no_form_to_compress_to():
    message = (
        r"^form 'usv' is that of layers in training, as LowRankTrainer writes it; set form to "
        r"'compact' or 'factors'\.$"
    )
    with pytest.raises(ConfigError, match=message):
        LowRankConfig(param_ratio=0.5, form="usv")


def test_the_joint_system_stores_it(text):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.6)
    report = hf_lowrank.compress_jointly(model, config, text[:6], text[6:9], progress=False)
    assert report.parameters.targeted_kept <= 0.6 * report.parameters.targeted_dense
    assert all(isinstance(each, CompactLinear) for each in factorized_layers(model).values())

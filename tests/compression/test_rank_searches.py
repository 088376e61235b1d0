"""`compress` with the searches of other systems: held-out data, budgets, what is refused."""

import pytest

from hf_lowrank import LowRankConfig, compress, sweep
from hf_lowrank.cli.arguments import CompressionArguments
from hf_lowrank.config import READERS, SEARCH_NAMES
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.report.sections import Data
from tests.tiny_models import sentence_batches, tiny_bert_classifier, tiny_llama, written_batches

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def text():
    """Six batches that the dense model wrote."""
    return written_batches(tiny_llama(), num_batches=6)


@pytest.mark.parametrize("rule", SEARCH_NAMES)
def test_a_search_keeps_the_budget_and_is_saved_with_the_ranks(text, rule):
    model = tiny_llama()
    trials = {"search_trials": 4} if rule in READERS["search_trials"][1] else {}
    config = LowRankConfig(param_ratio=0.5, rule=rule, **trials)
    report = compress(model, config, text[:4], held_out=text[4:], **QUIET)
    assert 0.45 < report.parameters.targeted_kept / report.parameters.targeted_dense <= 0.5
    assert model.config.quantization_config.ranks == report.ranks
    assert report.config.rule == rule


def test_the_search_measures_the_held_out_batches_alone(text):
    seen = []

    def loss(model, batch):
        seen.append(id(batch["input_ids"]))
        return item_losses(model, batch)

    config = LowRankConfig(param_ratio=0.5, metric="plain", rule="bayes-types", search_trials=5)
    compress(tiny_llama(), config, text[:4], held_out=text[4:], loss_function=loss, **QUIET)
    assert set(seen) <= {id(batch["input_ids"]) for batch in text[4:]}
    assert len(seen) <= 2 * (1 + 5)


def test_more_trials_never_do_worse_where_they_are_judged(text):
    found = {}
    for trials in (1, 12):
        model = tiny_llama()
        config = LowRankConfig(
            param_ratio=0.4, metric="whitened", rule="cross-entropy", search_trials=trials
        )
        compress(model, config, text[:4], held_out=text[4:], **QUIET)
        found[trials] = measure_loss(model, text[4:]).mean
    assert found[12] <= found[1]


def test_held_out_batches_are_taken_off_the_calibration_batches(text):
    config = LowRankConfig(param_ratio=0.5, rule="sensitivity")
    report = compress(tiny_llama(), config, text[:4], **QUIET)
    assert report.data == Data(calibration_tokens=3 * 4 * 16)
    with pytest.raises(DataError, match="ranks are searched"):
        compress(tiny_llama(), config, text[:1], **QUIET)


def test_a_search_needs_a_size(text):
    message = r"^rule 'bayes-groups' searches ranks for a size; set param_ratio\.$"
    with pytest.raises(ConfigError, match=message):
        compress(tiny_llama(), LowRankConfig(rule="bayes-groups"), text[:4])


def test_a_sweep_searches_at_every_size():
    batches = sentence_batches(4)
    config = LowRankConfig(param_ratio=0.5, rule="cross-entropy", search_trials=3)
    reports = list(sweep(tiny_bert_classifier(), config, [0.7, 0.3], batches, **QUIET))
    for report, ratio in zip(reports, (0.7, 0.3), strict=True):
        assert report.parameters.targeted_kept <= ratio * report.parameters.targeted_dense


@pytest.mark.parametrize("trials", [0, 1.5, True])
def test_trials_must_be_a_count(trials):
    with pytest.raises(ConfigError, match=r"^search_trials must be an integer >= 1, got "):
        LowRankConfig(search_trials=trials)


def test_the_script_reads_held_out_text_for_a_search():
    roles = [
        CompressionArguments(param_ratio=[0.5], rule=rule).text_roles()
        for rule in (None, "price", "sensitivity")
    ]
    assert ["held_out" in each for each in roles] == [False, False, True]

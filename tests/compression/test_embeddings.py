"""Compression of models without a head: their embeddings are kept, and nobody gives a label."""

import dataclasses
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

import hf_lowrank
from hf_lowrank import EmbeddingLoss, LowRankConfig
from hf_lowrank.compression.options import Texts
from hf_lowrank.compression.recipe import recipe_of
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.similarity import embeddings
from hf_lowrank.report.embedding_report import EmbeddingReport
from tests.measuring.losses.test_embeddings import VISION, images, tiny_bert
from tests.tiny_models import (
    build,
    equal_states,
    snapshot,
    tiny_bert_classifier,
    token_batches,
)

BATCHES = token_batches(10, batch_size=4, padding=4)
SIZE = LowRankConfig(param_ratio=0.5)


def compress(model, config=SIZE, *args, **options) -> EmbeddingReport:
    report = hf_lowrank.compress(model, config, *args, progress=False, **options)
    assert isinstance(report, EmbeddingReport)
    return report


def test_the_report_holds_the_cosine_to_the_dense_embeddings():
    model, loss = tiny_bert(), EmbeddingLoss()
    before = embeddings(model, BATCHES[8:], loss)
    report = compress(model, SIZE, BATCHES[:8], BATCHES[8:])
    after = embeddings(model, BATCHES[8:], loss)
    assert report.distance.cosine == pytest.approx(float((before * after).sum(1).mean()), abs=1e-6)
    assert report.distance.cosine < 0.9999
    assert report.distance.items == 8
    assert report.evaluation is None
    assert report.predicted_loss_difference > 0


def test_prices_beat_the_plain_singular_values():
    cosines = [
        compress(tiny_bert(), LowRankConfig(param_ratio=0.4, metric=metric), BATCHES, BATCHES)
        for metric in ("kfac", "plain")
    ]
    assert cosines[0].distance.cosine > cosines[1].distance.cosine


def test_prices_foretell_the_distance_of_a_cut():
    """Of one token each: the price of a layer adds up what its tokens do as if by chance."""
    batches = token_batches(16, batch_size=32, length=1)
    layer = "encoder.layer.1.output.dense"
    exact = {"input_damping": 0.0, "output_damping": 0.0}
    config = LowRankConfig(rank=12, target_modules=[layer], **exact)
    report = compress(tiny_bert(), config, batches, batches)
    assert report.predicted_loss_difference == pytest.approx(report.distance.distance, rel=0.3)


@pytest.mark.parametrize("held_out", [None, BATCHES[8:]], ids=["split off", "given"])
def test_a_tolerance_is_a_mean_cosine(held_out):
    config = LowRankConfig(loss_tolerance=0.01)
    report = compress(tiny_bert(), config, BATCHES[:8], BATCHES[8:], held_out=held_out)
    assert 0 <= report.held_out.mean <= 0.01
    assert report.parameters.targeted_share < 1
    tighter = compress(
        tiny_bert(), LowRankConfig(loss_tolerance=0.001), BATCHES[:8], held_out=held_out
    )
    assert tighter.parameters.targeted_share > report.parameters.targeted_share


def test_a_recovery_brings_the_embeddings_nearer():
    batches = token_batches(40, batch_size=8, padding=4)
    sets, config = (batches[:36], batches[36:]), LowRankConfig(param_ratio=0.3)
    report = compress(tiny_bert(), config, *sets, held_out=batches[32:36], recover_steps=150)
    assert report.recovery.accepted
    assert report.recovery.loss_after < 0.97 * report.recovery.loss_before
    cut = compress(tiny_bert(), config, *sets)
    assert report.distance.cosine > cut.distance.cosine


@pytest.mark.default_recipe
def test_channels_are_the_default_for_embeddings_alone():
    found = recipe_of(tiny_bert(), SIZE, Texts(BATCHES), None)
    assert (found.channels, found.measured_prices) == (True, False)
    found = recipe_of(tiny_bert_classifier(), SIZE, Texts(BATCHES), EmbeddingLoss("cls"))
    assert found.channels is True
    report = compress(tiny_bert(), LowRankConfig(param_ratio=0.3), BATCHES)
    assert report.narrowed


def test_another_pooling_is_a_loss_function_and_a_cache_tells_them_apart(tmp_path: Path):
    ranks = []
    for loss in (EmbeddingLoss(), EmbeddingLoss("cls"), EmbeddingLoss("cls")):
        report = compress(tiny_bert(), SIZE, BATCHES, loss_function=loss, cache_dir=tmp_path)
        ranks.append(report.ranks)
        assert report.pooling == loss.pooling
    assert ranks[1] == ranks[2] != ranks[0]


def test_the_embeddings_of_a_classifier_are_kept_if_asked_for():
    body = hf_lowrank.compress(tiny_bert_classifier().bert, SIZE, BATCHES, BATCHES, progress=False)
    assert isinstance(body, EmbeddingReport)


def test_images_go_through_the_same_code():
    tower = build(CLIPVisionModel, CLIPVisionConfig(**VISION), 0)
    batches = [{"pixel_values": part} for part in images().split(2)]
    report = compress(tower, SIZE, batches, batches, recover_steps=0)
    assert 0.5 < report.distance.cosine < 1
    assert report.distance.items == 4


def test_the_speed_is_in_sentences():
    report = compress(tiny_bert(), SIZE, BATCHES, speed=True)
    shapes = [(each.batch_size, each.tokens) for each in report.encoder_speed.timings]
    assert shapes == [(1, 32), (32, 32)]  # the tiny model reads 64 tokens
    assert all(min(each.sentences_per_second) > 0 for each in report.encoder_speed.timings)


def test_a_refused_run_leaves_the_model_as_it_was():
    model = tiny_bert()
    before = snapshot(model)
    message = (
        "^Joint compression follows the loss gradient, and the distance to a model's own embed"
    )
    with pytest.raises(ConfigError, match=message):
        hf_lowrank.compress_jointly(model, SIZE, BATCHES[:4], BATCHES[4:8], BATCHES[8:])
    assert equal_states(before, snapshot(model))


def test_the_report_is_read_back(tmp_path: Path):
    report = compress(tiny_bert(), SIZE, BATCHES, BATCHES, speed=True)
    report.save(tmp_path / "report.json")
    again = EmbeddingReport.load(tmp_path)
    assert again.distance == report.distance
    assert dataclasses.asdict(again.encoder_speed) == dataclasses.asdict(report.encoder_speed)

"""Few bits and their correction: packing, files, and errors in the metric that fall."""

import copy

import pytest
import torch

from benchmarks import low_bits
from benchmarks.divergence import measure_divergence
from benchmarks.frontier_rows import ROWS, Workshop
from benchmarks.low_bits import (
    analyze_lost,
    correction_ranks,
    low_bit_layer,
    packed,
    unpacked,
)
from hf_lowrank.compression.options import Run, Texts
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.modeling.surgery import swapped
from hf_lowrank.modeling.targets import find_targets
from tests.scripts import word_tokenizer
from tests.tiny_models import tiny_gpt2, tiny_llama

pytest.importorskip("torchao.quantization")

FP32 = torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_takes_the_bits_and_gives_the_numbers_back(bits):
    numbers = torch.randint(2**bits, (5, 13), generator=torch.Generator().manual_seed(0))
    numbers = numbers.to(torch.uint8)
    stored = packed(numbers, bits)
    assert stored.dtype == torch.uint8
    assert len(stored) == -(-numbers.numel() * bits // 8)
    assert torch.equal(unpacked(stored, bits, numbers.numel()), numbers.flatten())


def test_a_layer_computes_with_what_it_was_rounded_to_and_more_bits_are_nearer():
    layer = torch.nn.Linear(128, 24)
    inputs, errors = torch.randn(7, 128), []
    for bits in (2, 3, 4):
        rounded = low_bit_layer(layer, bits, FP32)
        assert len(rounded.get_buffer("numbers").unique()) <= 2**bits
        assert rounded.get_buffer("scale").shape == (24, 2)
        expected = inputs @ rounded.rounded().T + layer.bias
        torch.testing.assert_close(rounded(inputs), expected)
        errors.append(float((rounded.rounded() - linear_weight(layer)).square().mean()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.fixture(scope="module")
def lost(text):
    model = tiny_llama()
    run = Run(Texts(text[:8]))
    targets = find_targets(model, LowRankConfig())
    return model, targets, run, analyze_lost(model, targets, 2, FP32, run)


def predicted(analysis):
    return {name: float(spectrum.price.sum()) for name, spectrum in analysis.spectra.items()}


def test_a_correction_lowers_the_error_in_the_metric_by_what_its_rank_is_worth(lost, monkeypatch):
    model, targets, run, analysis = lost
    ranks = {name: 3 + len(name) % 4 for name in targets}
    layers = {
        name: low_bit_layer(layer, 2, FP32, ranks[name], analysis.factors[name])
        for name, layer in targets.items()
    }

    class Corrected:
        def __init__(self, layer):
            self.layer = layer

        def rounded(self):
            left = linear_weight(self.layer.lowrank_B) @ linear_weight(self.layer.lowrank_A)
            return self.layer.rounded() + left

    by_layer = {id(layer): Corrected(layers[name]) for name, layer in targets.items()}
    monkeypatch.setattr(low_bits, "low_bit_layer", lambda layer, *_: by_layer[id(layer)])
    left = predicted(analyze_lost(model, targets, 2, FP32, run))
    for name, spectrum in analysis.spectra.items():
        expected = float(spectrum.price[ranks[name] :].sum())
        assert expected < 0.9 * float(spectrum.price.sum())
        # The rest is the damping of the metric and the rounding of the factors.
        assert left[name] == pytest.approx(expected, rel=0.1)


def test_a_correction_brings_the_loss_and_the_outputs_nearer_to_the_dense_model(lost, text):
    model, targets, _, analysis = lost
    rises, divergences = [], []
    for extra in (0.0, 0.1, 0.3):
        ranks = correction_ranks(analysis.spectra, extra)
        layers = {
            name: low_bit_layer(layer, 2, FP32, ranks[name], analysis.factors[name])
            for name, layer in targets.items()
        }
        other = copy.deepcopy(model)
        with swapped(other, layers):
            found = measure_divergence(model, other, text[8:])
        rises.append(found.after.mean - found.before.mean)
        divergences.append(float(found.kl.mean()))
    assert rises[0] > rises[1] > rises[2] > 0
    assert divergences[0] > divergences[1] > divergences[2] > 0


def test_analyzing_what_is_lost_leaves_the_model_dense(lost):
    model, targets, _, _ = lost
    assert all(model.get_submodule(name) is layer for name, layer in targets.items())


def spectrum(shape, *prices):
    found = torch.tensor(prices, dtype=torch.float64)
    return Spectrum(shape, found.sqrt(), found)


def test_ranks_go_where_a_number_buys_most():
    spectra = {
        "small": spectrum((4, 4), 8.0, 1.0, 0.1),  # 8 numbers: 1, 0.125, 0.0125 each
        "large": spectrum((20, 20), 10.0, 9.0, 0.1),  # 40 numbers: 0.25, 0.225, 0.0025 each
    }
    total = 4 * 4 + 20 * 20
    assert correction_ranks(spectra, 0.0) == {"small": 0, "large": 0}
    assert correction_ranks(spectra, 8 / total) == {"small": 1, "large": 0}
    assert correction_ranks(spectra, 48 / total) == {"small": 1, "large": 1}
    assert correction_ranks(spectra, 88 / total) == {"small": 1, "large": 2}
    assert correction_ranks(spectra, 96 / total) == {"small": 2, "large": 2}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_file_holds_all_that_the_model_computes(make, text, tmp_path):
    model = make()
    shop = Workshop(model, word_tokenizer(), Run(Texts(text[:4])), tmp_path / "seconds")
    row = ROWS["hqq3+0.1"]
    shop.make(row, tmp_path / "file")
    loaded = shop.load(row, tmp_path / "file", "float32")
    targets = find_targets(model, LowRankConfig())
    ranks = correction_ranks(shop.analyses["hqq3"].spectra, 0.1)
    assert any(ranks.values())
    for name, layer in targets.items():
        made = low_bit_layer(
            layer, 3, torch.bfloat16, ranks[name], shop.analyses["hqq3"].factors[name]
        )
        read = loaded.get_submodule(name)
        assert read.rank == ranks[name]
        torch.testing.assert_close(read.rounded(), made.rounded().float(), rtol=0.02, atol=1e-3)
        for part in ("lowrank_A", "lowrank_B") if read.rank else ():
            pair = (linear_weight(getattr(each, part)).float() for each in (read, made))
            torch.testing.assert_close(*pair, rtol=0.02, atol=1e-3)
    assert measure_loss(loaded, text[8:]).mean == pytest.approx(
        measure_loss(model, text[8:]).mean, abs=0.3
    )


def test_losses_of_both_models_are_those_that_are_measured_one_by_one(text):
    first, second = tiny_llama(0), tiny_llama(1)
    found = measure_divergence(first, second, text[:2])
    for measured, model in ((found.before, first), (found.after, second)):
        expected = measure_loss(model, text[:2])
        assert measured.positions == expected.positions == len(found.kl)
        assert measured.mean == pytest.approx(expected.mean, rel=1e-5)
    one, other = (
        each(input_ids=text[0]["input_ids"]).logits[0, 4].detach().double().log_softmax(-1)
        for each in (first, second)
    )
    assert float(found.kl[4]) == pytest.approx(float((one.exp() * (one - other)).sum()), rel=1e-4)


def test_a_torchao_without_the_solver_is_refused(monkeypatch):
    monkeypatch.delattr(
        "torchao.quantization.quant_primitives._choose_qparams_and_quantize_affine_hqq"
    )
    with pytest.raises(ConfigError, match="HQQ needs a torchao that has its solver: pip install"):
        low_bit_layer(torch.nn.Linear(8, 8), 4, FP32)

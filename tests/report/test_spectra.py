"""Spectra in a report: bounded, faithful at the components that are kept, placed by layer name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowrank
from hf_lowrank import LowRankConfig, Report
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import DataError
from hf_lowrank.report.layers import by_type, kept_shares, short_block_names, split_name
from hf_lowrank.report.sections import LayerSpectrum, Sample
from hf_lowrank.report.spectra import MAX_POINTS, compact_spectra, shown_components
from tests.report.test_report import report
from tests.tiny_models import tiny_llama


def spectrum(size: int, scale: float | None) -> Spectrum:
    sigma = torch.logspace(1, -6, size, dtype=torch.float64)
    price = None if scale is None else sigma**2 * scale
    return Spectrum((size + 2, size), sigma, price)


@pytest.mark.parametrize("size", [1, MAX_POINTS, MAX_POINTS + 1, 14336])
def test_few_components_are_shown_with_both_ends(size: int):
    shown = shown_components(size)
    assert len(shown) <= MAX_POINTS
    assert shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (0, size - 1)
    assert len(shown) == min(size, MAX_POINTS) or size < 2 * MAX_POINTS


def test_the_first_components_are_shown_more_densely():
    shown = shown_components(4096)
    assert shown[10] - shown[9] < (shown[-1] - shown[-2]) / 2


@pytest.mark.parametrize("scale", [0.25, None])
def test_singular_values_and_prices_are_those_of_the_spectrum(scale: float | None):
    original = spectrum(500, scale)
    found = compact_spectra({"a": original})["a"]
    assert found.shape == (502, 500)
    expected = original.sigma[shown_components(500)]
    assert torch.allclose(torch.tensor(found.sigma).double(), expected, rtol=5e-4, atol=0)
    assert found.price_scale == (None if scale is None else pytest.approx(scale, rel=1e-3))


def test_a_weight_of_zeros_has_no_price():
    nothing = Spectrum((4, 3), torch.zeros(3).double(), torch.zeros(3))
    assert compact_spectra({"a": nothing})["a"].price_scale is None


def test_a_run_reports_the_spectra_of_all_targets_and_the_class(tmp_path: Path):
    model = tiny_llama()
    found = hf_lowrank.compress(
        model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False
    )
    assert found.architecture == "LlamaForCausalLM"
    assert set(found.spectra) == set(found.ranks)
    shares = kept_shares(found)
    total = sum(
        share * rows * columns
        for share, (rows, columns) in ((shares[n], s.shape) for n, s in found.spectra.items())
    )
    assert total == pytest.approx(found.parameters.targeted_kept)
    found.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text("utf-8")
    assert text.count("\n") < 40 * len(found.ranks)
    assert Report.load(tmp_path) == found


# Reading a report


def changed(**fields: Any) -> str:
    return json.dumps(report().to_dict() | fields)


def test_lists_of_numbers_stand_on_one_line_and_text_stays_as_it_is(tmp_path: Path):
    tricky = "[\n 1,\n 2 ] [ 3,  4 ]"
    spectra = {"a": LayerSpectrum((3, 2), (1.5, 2e-07), None)}
    original = report(spectra=spectra, samples=[Sample(tricky, "", "")])
    original.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text("utf-8")
    assert '"sigma": [1.5, 2e-07]' in text
    assert json.loads(text) == original.to_dict()


def test_fields_of_a_later_version_are_left_out(tmp_path: Path):
    data = report().to_dict() | {"later": 1}
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert Report.load(tmp_path / "report.json") == report()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "can't be read"),
        ("{", "is not a report of hf_lowrank"),
        ("[]", "is not a report of hf_lowrank"),
        ('{"model": "tiny"}', "is not a report of hf_lowrank"),
        (changed(parameters={"dense": 1}), r"\(parameters.kept is missing\)"),
        (changed(bytes={"dense": 1, "kept": 0}), r"\(its sizes are not counts\)"),
        (changed(bytes={"dense": 1, "kept": True}), r"\(bytes.kept can't be 'True'\)"),
        (changed(evaluation={"loss": 1}), r"\(evaluation.perplexity_before is missing\)"),
        (changed(evaluation=[1]), r"\(evaluation is no object\)"),
        (changed(narrowed={"a": [1, 2, 3]}), r"\(narrowed.a can't be '\[1, 2, 3\]'\)"),
        (changed(config={"metric": 5}), r"\(config.metric can't be '5'\)"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str | None, reason: str):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        Report.load(tmp_path / "report.json")


# Places of layers


def test_layers_are_placed_by_their_names():
    assert split_name("model.layers.3.mlp.up_proj") == ("model.layers.3", "mlp.up_proj")
    assert split_name("encoder.block.0.layer.1.wi") == ("encoder.block.0", "layer.1.wi")
    assert split_name("classifier") == ("", "classifier")
    assert split_name("net.0") == ("", "net.0")
    assert by_type(["h.0.a", "h.0.b", "h.1.a"]) == {"a": ["h.0.a", "h.1.a"], "b": ["h.0.b"]}


def test_block_names_are_short_where_that_is_clear():
    assert short_block_names(["h.0", "h.1", ""]) == {"h.0": "0", "h.1": "1", "": ""}
    both = ["encoder.0", "decoder.0"]
    assert short_block_names(both) == dict(zip(both, both, strict=True))

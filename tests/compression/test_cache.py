"""Runs with a cache folder, and runs in several passes for want of memory."""

import pytest
import torch

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.errors import StorageError
from tests.compression import DRY, NAN_LAYER, CountingLoss, model_with_nan
from tests.tiny_models import equal_states, snapshot, tiny_llama

# The cache


def run_cached(folder, text, build=tiny_llama, **settings):
    model, loss = build(), CountingLoss()
    config = LowRankConfig(param_ratio=0.6, **settings)
    report = compress(model, config, text, loss_function=loss, cache_dir=folder, progress=False)
    return report, snapshot(model), loss.calls


@pytest.fixture
def cached(text, tmp_path):
    """A filled cache folder, and the run that filled it."""
    return tmp_path / "cache", run_cached(tmp_path / "cache", text[:3])


def test_a_second_run_reads_the_spectra(cached, text):
    folder, (report, expected, calls) = cached
    again, found, calls_again = run_cached(folder, text[:3])
    assert (calls, calls_again) == (3 + DRY, DRY)
    assert "statistics" in report.seconds
    assert {"statistics", "decomposition"}.isdisjoint(again.seconds)
    assert again.ranks == report.ranks
    assert equal_states(found, expected)


def test_another_goal_reads_the_same_spectra(cached, text):
    model, loss = tiny_llama(), CountingLoss()
    config = LowRankConfig(rank=4)
    compress(model, config, text[:3], loss_function=loss, cache_dir=cached[0], progress=False)
    assert loss.calls == DRY


def test_another_damping_reads_the_same_moments(cached, text):
    report, _, calls = run_cached(cached[0], text[:3], input_damping=0.3)
    assert calls == DRY
    assert "decomposition" in report.seconds


@pytest.mark.parametrize("change", ["text", "model", "seed", "metric"])
def test_other_inputs_are_measured_anew(cached, text, change):
    batches = text[3:6] if change == "text" else text[:3]
    settings = {"seed": {"seed": 1}, "metric": {"metric": "fisher-rows"}}.get(change, {})
    build = (lambda: tiny_llama(seed=1)) if change == "model" else tiny_llama
    assert run_cached(cached[0], batches, build, **settings)[2] == 3 + DRY


@pytest.mark.parametrize("kind", ["spectra", "moments"])
def test_half_written_temporary_files_are_ignored(cached, text, kind):
    folder, (_, expected, _) = cached
    (file,) = folder.glob(f"{kind}-*.pt")
    data = file.read_bytes()
    for path in folder.iterdir():
        path.unlink()
    file.with_name(f"{file.name}.tmp-12345").write_bytes(data[: len(data) // 2])
    _, found, calls = run_cached(folder, text[:3])
    assert calls == 3 + DRY
    assert equal_states(found, expected)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"{}"])
@pytest.mark.parametrize("kind", ["spectra", "moments"])
def test_a_damaged_file_is_computed_again(cached, text, kind, damage, capsys):
    folder, (_, expected, _) = cached
    (file,) = folder.glob(f"{kind}-*.pt")
    if kind == "moments":
        (folder / next(folder.glob("spectra-*")).name).unlink()
    file.write_bytes(damage(file.read_bytes()))
    report, found, calls = run_cached(folder, text[:3])
    assert calls == DRY + (0 if kind == "spectra" else 3)
    assert f"{file} can't be read; what it held is computed again" in capsys.readouterr().err
    assert "decomposition" in report.seconds
    assert equal_states(found, expected)
    assert run_cached(folder, text[:3])[0].seconds.keys().isdisjoint({"decomposition"})


def test_failures_are_remembered(tmp_path):
    config = LowRankConfig(param_ratio=0.7, metric="plain")
    reports = [
        compress(model_with_nan(), config, cache_dir=tmp_path, progress=False) for _ in range(2)
    ]
    assert reports[0].failures == reports[1].failures
    assert list(reports[1].failures) == [NAN_LAYER]


def test_a_cache_that_cannot_be_written_is_an_error(text, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"Could not write to the cache folder .*file"):
        run_cached(tmp_path / "file", text[:2])


def test_no_temporary_file_is_left(cached):
    assert all(path.suffix == ".pt" for path in cached[0].iterdir())


# Groups of layers


@pytest.mark.parametrize("label_source", ["data", "model"])
def test_little_memory_means_more_passes_and_the_same_result(text, label_source):
    config = LowRankConfig(param_ratio=0.6, label_source=label_source)
    results = []
    for moment_gib in (8.0, 40_000 / 2**30, 0.0):
        model, loss = tiny_llama(), CountingLoss()
        options = {"loss_function": loss, "moment_gib": moment_gib, "progress": False}
        if label_source == "model":
            del options["loss_function"]
        report = compress(model, config, text[:3], **options)
        results.append((report.ranks, snapshot(model), loss.calls))
    assert results[0][0] == results[1][0] == results[2][0]
    for name, tensor in results[0][1].items():
        for other in results[1:]:
            torch.testing.assert_close(other[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    if label_source == "data":
        passes = [(calls - DRY) / 3 for _, _, calls in results]
        assert passes[0] == 1
        assert 1 < passes[1] < 14
        assert passes[2] == 14


def test_groups_are_cached_one_by_one(text, tmp_path):
    model, config, loss = tiny_llama(), LowRankConfig(param_ratio=0.6), CountingLoss(fail_at=8)
    options = {"cache_dir": tmp_path, "moment_gib": 40_000 / 2**30, "progress": False}
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        compress(model, config, text[:3], loss_function=loss, **options)
    whole, resumed = CountingLoss(), CountingLoss()
    expected = compress(
        tiny_llama(), config, text[:3], loss_function=whole, **{**options, "cache_dir": None}
    )
    found = compress(model, config, text[:3], loss_function=resumed, **options)
    assert resumed.calls == whole.calls - 2 * 3
    assert found.ranks == expected.ranks


def test_each_group_says_what_is_done_where_there_is_no_terminal(text, capsys):
    config = LowRankConfig(param_ratio=0.6)
    compress(tiny_llama(), config, text[:3], moment_gib=40_000 / 2**30)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "... try the layers on the first batch"
    calibrations = [line for line in lines if line.startswith("... calibrate up to model.layers.")]
    assert len(calibrations) > 1
    assert all(line.endswith(": 0 of 3 batches, 0%") for line in calibrations)
    assert sum(line.startswith("... decompose: 0 of ") for line in lines) == len(calibrations)

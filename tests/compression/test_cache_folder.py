"""Moments and spectra on disk: whole or absent, and never those of another run."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression import analysis
from hf_lowrank.compression.analysis import decompose_layers
from hf_lowrank.compression.cache import RunCache
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.decomposition.spectrum import Factors, Spectrum
from hf_lowrank.errors import StorageError
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import Batch, ItemLosses
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.modeling.targets import find_targets
from tests.tiny_models import equal_states, tiny_llama, token_batches

NEEDS = ("input", "output")
EVERYTHING = frozenset().union(*(metric.needs for metric in METRICS.values()))


def run_cache(folder: Path, **changes: Any) -> RunCache:
    settings: dict[str, Any] = {
        "model": tiny_llama(),
        "calibration": token_batches(2),
        "config": LowRankConfig(param_ratio=0.5),
    }
    return RunCache(folder, **(settings | changes))


def decomposed(seed: int = 0, price: bool = True) -> tuple[Spectrum, Factors]:
    generator = torch.Generator().manual_seed(seed)
    spectrum = Spectrum(
        (6, 5),
        torch.rand(4, generator=generator, dtype=torch.float64),
        torch.rand(4, generator=generator, dtype=torch.float64) if price else None,
    )
    left, right = torch.randn(6, 4, generator=generator), torch.randn(4, 5, generator=generator)
    return spectrum, Factors(left, right)


def spectra_of(*names: str, seed: int = 0) -> Any:
    spectrum, factors = decomposed(seed)
    return dict.fromkeys(names, spectrum), dict.fromkeys(names, factors), {}


def same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.dtype == two.dtype and torch.equal(one, two)


def same_parts(one: Any, two: Any, *parts: str) -> bool:
    return all(same(getattr(one, part), getattr(two, part)) for part in parts)


# Round trips


@pytest.mark.parametrize("price", [True, False])
def test_spectra_and_failures_come_back_as_they_were(tmp_path: Path, price: bool):
    names = ["a", "b", "c"]
    pairs = {"a": decomposed(0, price), "c": decomposed(1, price)}
    spectra = {name: spectrum for name, (spectrum, _) in pairs.items()}
    factors = {name: found for name, (_, found) in pairs.items()}
    failures = {"b": "the weight holds NaN"}
    run_cache(tmp_path).write("spectra", names, (spectra, factors, failures))
    found = run_cache(tmp_path).read("spectra", names)
    assert found is not None
    assert set(found[0]) == set(found[1]) == {"a", "c"}
    assert found[2] == failures
    for name, spectrum in spectra.items():
        assert found[0][name].shape == (6, 5)
        assert same_parts(found[0][name], spectrum, "sigma", "price")
        assert same_parts(found[1][name], factors[name], "left", "right")


@pytest.mark.parametrize("needs", [frozenset(NEEDS), EVERYTHING], ids=["kfac", "all"])
def test_moments_come_back_as_they_were(tmp_path: Path, needs: frozenset[str]):
    model = tiny_llama()
    targets = find_targets(model, LowRankConfig())
    names = list(targets)
    moments = collect_moments(model, targets, token_batches(2), needs)
    run_cache(tmp_path).write("moments", names, moments)
    found = run_cache(tmp_path).read("moments", names)
    assert found is not None
    assert list(found) == names
    for name in names:
        one, two = moments[name], found[name]
        for part in ("input_abs", "gradient_rows", "gradient"):
            assert same(getattr(one, part), getattr(two, part))
        for part in sorted(needs & {"input", "input_centred", "output"}):
            before, after = getattr(one, part), getattr(two, part)
            assert same(before.matrix, after.matrix)
            assert (before.squares, before.size) == (after.squares, after.size)
            assert before.is_projected == after.is_projected
        assert (one.tokens, one.losses) == (two.tokens, two.losses)


def test_moments_that_are_shared_are_stored_once_and_shared_again(tmp_path: Path):
    shared = SecondMoment(torch.eye(3), 3.0, 3)
    moments = {name: Moments(input=shared, tokens=5, losses=4) for name in ("q", "k", "v")}
    run_cache(tmp_path).write("moments", moments, moments)
    (path,) = tmp_path.iterdir()
    with zipfile.ZipFile(path) as file:
        assert sum("/data/" in name for name in file.namelist()) == 1
    found = run_cache(tmp_path).read("moments", moments)
    assert found is not None
    assert found["q"].input is found["k"].input is found["v"].input


def test_what_is_not_there_is_none(tmp_path: Path):
    empty = run_cache(tmp_path / "nothing")
    assert empty.read("spectra", ["a"]) is None
    assert empty.read("moments", ["a", *NEEDS]) is None
    assert not (tmp_path / "nothing").exists()


# Keys


def changed_model() -> nn.Module:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    return model


def other_tokens() -> list[Batch]:
    batches = token_batches(2)
    batches[1]["input_ids"][0, 3] += 1
    return batches


def masked_batches() -> list[Batch]:
    batches = token_batches(2)
    batches[1]["attention_mask"][0, -1] = 0
    return batches


# Made only when needed: a test is collected by every worker, but run by one.
CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "other weights": lambda: {"model": changed_model()},
    "other dtype": lambda: {"model": tiny_llama().to(torch.bfloat16)},
    "other activation": lambda: {"model": tiny_llama(hidden_act="gelu")},
    "other positions": lambda: {"model": tiny_llama(rope_parameters={"rope_theta": 100.0})},
    "other tokens": lambda: {"calibration": other_tokens()},
    "other mask": lambda: {"calibration": masked_batches()},
    "fewer batches": lambda: {"calibration": token_batches(1)},
    "other labels": lambda: {"config": LowRankConfig(param_ratio=0.5, label_source="model")},
    "other seed": lambda: {"config": LowRankConfig(param_ratio=0.5, seed=1)},
}
SPECTRUM_CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "other metric": lambda: {"config": LowRankConfig(param_ratio=0.5, metric="whitened")},
    "other input damping": lambda: {"config": LowRankConfig(param_ratio=0.5, input_damping=0.02)},
    "other output damping": lambda: {"config": LowRankConfig(param_ratio=0.5, output_damping=0.2)},
}


@pytest.mark.parametrize("change", [*CHANGES, *SPECTRUM_CHANGES])
def test_spectra_of_another_run_are_not_used(tmp_path: Path, change: str):
    run_cache(tmp_path).write("spectra", ["a"], spectra_of("a"))
    other = run_cache(tmp_path, **(CHANGES | SPECTRUM_CHANGES)[change]())
    assert other.read("spectra", ["a"]) is None


def test_spectra_of_another_exponent_are_not_used(tmp_path: Path):
    one, other = (
        LowRankConfig(param_ratio=0.5, metric="activation-scale", activation_alpha=alpha)
        for alpha in (0.5, 0.4)
    )
    run_cache(tmp_path, config=one).write("spectra", ["a"], spectra_of("a"))
    assert run_cache(tmp_path, config=one).read("spectra", ["a"]) is not None
    assert run_cache(tmp_path, config=other).read("spectra", ["a"]) is None


@pytest.mark.parametrize("change", list(CHANGES))
def test_moments_of_another_run_are_not_used(tmp_path: Path, change: str):
    run_cache(tmp_path).write("moments", ["a", *NEEDS], {"a": Moments(tokens=1, losses=1)})
    assert run_cache(tmp_path, **CHANGES[change]()).read("moments", ["a", *NEEDS]) is None


@pytest.mark.parametrize("change", list(SPECTRUM_CHANGES))
def test_moments_serve_all_metrics_that_need_the_same(tmp_path: Path, change: str):
    run_cache(tmp_path).write("moments", ["a", *NEEDS], {"a": Moments(tokens=1, losses=1)})
    assert (
        run_cache(tmp_path, **SPECTRUM_CHANGES[change]()).read("moments", ["a", *NEEDS]) is not None
    )


def test_other_layers_and_other_fields_are_other_entries(tmp_path: Path):
    written = run_cache(tmp_path)
    written.write("spectra", ["a", "b"], spectra_of("a", "b"))
    written.write("moments", ["a", *NEEDS], {"a": Moments(tokens=1, losses=1)})
    assert written.read("spectra", ["a"]) is None
    assert written.read("spectra", ["a", "b", "c"]) is None
    assert written.read("moments", ["a", "input"]) is None
    assert written.read("moments", ["b", *NEEDS]) is None


def test_the_goal_and_the_rule_share_their_spectra(tmp_path: Path):
    run_cache(tmp_path).write("spectra", ["a"], spectra_of("a"))
    for config in (
        LowRankConfig(loss_tolerance=0.1),
        LowRankConfig(param_ratio=0.3, rule="energy", min_rank=2),
        LowRankConfig(rank=3, rank_pattern={"a": 2}),
    ):
        assert run_cache(tmp_path, config=config).read("spectra", ["a"]) is not None


# Damage


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_file_that_was_cut_off_is_made_again(tmp_path: Path, keep: int):
    run_cache(tmp_path).write("spectra", ["a"], spectra_of("a"))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert run_cache(tmp_path).read("spectra", ["a"]) is None
    run_cache(tmp_path).write("spectra", ["a"], spectra_of("a"))
    assert run_cache(tmp_path).read("spectra", ["a"]) is not None


def test_a_file_that_is_something_else_is_made_again(tmp_path: Path):
    run_cache(tmp_path).write("spectra", ["a"], spectra_of("a"))
    (path,) = tmp_path.iterdir()
    torch.save({"x": Path("code that would run")}, path)
    assert run_cache(tmp_path).read("spectra", ["a"]) is None


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("full"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    def save(value: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        run_cache(tmp_path).write("spectra", ["a"], spectra_of("a"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(StorageError, match=r"cache folder .*file: .*Not a directory"):
        run_cache(tmp_path / "file").write("spectra", ["a"], spectra_of("a"))


# Whole runs


def compressed_state(cache_dir: Path | None, **changes: Any) -> dict[str, torch.Tensor]:
    model = changes.pop("model", None) or tiny_llama()
    config = changes.pop("config", LowRankConfig(param_ratio=0.5))
    compress(model, config, token_batches(4), cache_dir=cache_dir, progress=False, **changes)
    return dict(model.state_dict())


@pytest.mark.parametrize("metric", list(METRICS))
def test_a_cached_run_equals_one_without_a_cache(tmp_path: Path, metric: str):
    config = LowRankConfig(param_ratio=0.5, metric=metric)
    without = compressed_state(None, config=config)
    assert equal_states(compressed_state(tmp_path, config=config), without)
    assert equal_states(compressed_state(tmp_path, config=config), without)


def test_a_group_of_layers_that_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run in many small groups, killed in the middle."""
    finished = []

    def counted(layers: Any, *args: Any, **kwargs: Any) -> Any:
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(list(layers))
        return decompose_layers(layers, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(analysis, "decompose_layers", counted)
        with pytest.raises(KeyboardInterrupt):
            compressed_state(tmp_path, moment_gib=1e-5)
    collected, again = [], []

    def collect(model: nn.Module, targets: Any, *args: Any, **kwargs: Any) -> Any:
        collected.extend(targets)
        return collect_moments(model, targets, *args, **kwargs)

    def decompose(layers: Any, *args: Any, **kwargs: Any) -> Any:
        again.extend(layers)
        return decompose_layers(layers, *args, **kwargs)

    monkeypatch.setattr(analysis, "collect_moments", collect)
    monkeypatch.setattr(analysis, "decompose_layers", decompose)
    resumed = compressed_state(tmp_path, moment_gib=1e-5)
    done = {name for group in finished for name in group}
    assert len(again) == 14 - len(done)
    assert not done & set(again)
    assert len(collected) < len(again), "the killed group's moments were there already"
    monkeypatch.undo()
    assert equal_states(resumed, compressed_state(None, moment_gib=1e-5))


def test_the_size_of_the_groups_changes_no_result(tmp_path: Path):
    assert equal_states(
        compressed_state(None, moment_gib=1e-5), compressed_state(tmp_path, moment_gib=8.0)
    )


def doubled_losses(model: nn.Module, batch: Batch) -> ItemLosses:
    found = item_losses(model, batch)
    return ItemLosses(found.sums * torch.arange(1, len(found.sums) + 1), found.counts)


def test_another_loss_function_does_not_use_the_results_of_the_first(tmp_path: Path):
    fresh = compressed_state(None, loss_function=doubled_losses)
    assert not equal_states(fresh, compressed_state(tmp_path))
    assert equal_states(fresh, compressed_state(tmp_path, loss_function=doubled_losses))


def test_a_model_with_the_same_weights_but_another_activation_is_another_model(tmp_path: Path):
    fresh = compressed_state(None, model=tiny_llama(hidden_act="gelu"))
    assert not equal_states(fresh, compressed_state(tmp_path))
    assert equal_states(fresh, compressed_state(tmp_path, model=tiny_llama(hidden_act="gelu")))


def test_a_stale_temporary_file_is_not_in_the_way(tmp_path: Path):
    run_cache(tmp_path).write("spectra", ["a"], spectra_of("a"))
    (path,) = tmp_path.iterdir()
    left = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    left.mkdir()
    path.rename(left / path.name)
    run_cache(tmp_path).write("spectra", ["a"], spectra_of("a", seed=1))
    found = run_cache(tmp_path).read("spectra", ["a"])
    assert found is not None
    assert same_parts(found[1]["a"], decomposed(1)[1], "left", "right")

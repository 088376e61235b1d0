"""`compress` and `sweep`: goals, reports, resuming, and what they leave behind."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_lowrank
from hf_lowrank import LowRankConfig, LowRankLinear, compress, get_lowrank_model, sweep
from hf_lowrank.errors import ConfigError, DataError, NumericalError, StorageError
from hf_lowrank.losses import ItemLosses, item_losses
from tiny_models import (
    HIDDEN,
    batches_for,
    logits,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    token_batches,
    written_batches,
)

NAN_LAYER = "model.layers.0.mlp.up_proj"
BATCH = token_batches(1)[0]


@pytest.fixture(scope="module")
def text():
    """Batches that the dense model wrote, to be shared out by each test."""
    return written_batches(tiny_llama(), num_batches=12)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def is_dense(model):
    return not any(isinstance(module, LowRankLinear) for module in model.modules())


def num_hooks(model):
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def mean_loss(model, batches):
    """Independent of the package: next-token loss, nats per token."""
    total, count = 0.0, 0
    for batch in batches:
        found = logits(model, batch)[:, :-1].double()
        total += float(F.cross_entropy(found.mT, batch["input_ids"][:, 1:], reduction="sum"))
        count += batch["input_ids"][:, 1:].numel()
    return total / count


class CountingLoss:
    """The usual loss; counts its calls, and fails at one of them."""

    def __init__(self, fail_at=None):
        self.calls = 0
        self.fail_at = fail_at

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("stopped on purpose")
        return item_losses(model, batch)


# The report


def test_report_tells_what_was_done(text):
    model, dense = tiny_llama(), tiny_llama()
    config = LowRankConfig(param_ratio=0.6, seed=3)
    report = compress(model, config, text[:6], text[6:8], progress=False)
    assert report.config["param_ratio"] == 0.6
    assert "ranks" not in report.config
    assert report.seed == 3
    assert report.parameters["dense"] == sum(p.numel() for p in dense.parameters())
    assert report.parameters["kept"] == sum(p.numel() for p in model.parameters())
    assert report.bytes == {k: 4 * report.parameters[k] for k in ("dense", "kept")}
    saved = report.parameters["targeted_dense"] - report.parameters["targeted_kept"]
    assert report.parameters["dense"] - report.parameters["kept"] == saved > 0
    assert report.data == {"calibration_tokens": 6 * 4 * 16}
    assert set(report.seconds) >= {"statistics", "decomposition", "ranks", "surgery", "evaluation"}
    assert (report.failures, report.untouched, report.probes) == ({}, {}, [])
    assert report.held_out is None
    assert report.versions["torch"] == torch.__version__


def test_evaluation_agrees_with_an_independent_loss(text):
    model, dense = tiny_llama(), tiny_llama()
    report = compress(model, LowRankConfig(param_ratio=0.6), text[:6], text[6:8], progress=False)
    before, after = mean_loss(dense, text[6:8]), mean_loss(model, text[6:8])
    found = report.evaluation
    assert found.loss_before == pytest.approx(before, rel=1e-5)
    assert found.loss_after == pytest.approx(after, rel=1e-5)
    assert found.loss_difference == pytest.approx(after - before, abs=1e-5)
    assert found.perplexity_after == pytest.approx(float(torch.tensor(after).exp()), rel=1e-4)
    assert found.tokens == 2 * 4 * 15


def test_report_is_json(text, tmp_path):
    report = compress(tiny_llama(), LowRankConfig(param_ratio=0.6), text[:2], progress=False)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


def test_decision_is_in_the_config_that_is_saved(text):
    model = tiny_llama()
    report = compress(model, LowRankConfig(param_ratio=0.6), text[:4], progress=False)
    assert model.config.quantization_config.ranks == report.ranks
    assert model.config.to_dict()["quantization_config"]["ranks"] == report.ranks


def test_the_same_run_gives_the_same_model(text):
    models = [tiny_llama(), tiny_llama()]
    for model in models:
        compress(model, LowRankConfig(param_ratio=0.5), text[:4], progress=False)
    assert equal_states(state(models[0]), state(models[1]))


# Goals


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("metric", ["kfac", "whitened", "plain"])
def test_budget_is_never_exceeded_and_nearly_spent(text, metric, ratio):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=ratio, metric=metric)
    sizes = compress(model, config, text[:4], progress=False).parameters
    budget = ratio * sizes["targeted_dense"]
    largest_component = HIDDEN + 2 * HIDDEN
    assert budget - largest_component < sizes["targeted_kept"] <= budget


def test_ratio_of_one_keeps_every_layer_dense(text):
    model = tiny_llama()
    report = compress(model, LowRankConfig(param_ratio=1.0), text[:2], progress=False)
    assert set(report.ranks.values()) == {None}
    assert equal_states(state(model), state(tiny_llama()))


@pytest.mark.parametrize("tolerance", [0.02, 0.2])
def test_loss_tolerance_holds_on_the_held_out_text(text, tolerance):
    model, dense = tiny_llama(), tiny_llama()
    config = LowRankConfig(loss_tolerance=tolerance)
    report = compress(model, config, text[:6], held_out=text[6:10], progress=False)
    rise = mean_loss(model, text[6:10]) - mean_loss(dense, text[6:10])
    assert rise <= tolerance
    assert report.held_out["mean"] == pytest.approx(rise, abs=1e-5)
    assert report.held_out["complete"]
    assert report.held_out["items"] == 16
    assert not is_dense(model)
    assert "search" in report.seconds


def test_search_ends_beside_a_size_that_is_too_small(text):
    config = LowRankConfig(loss_tolerance=0.1)
    report = compress(tiny_llama(), config, text[:6], held_out=text[6:10], progress=False)
    kept = report.parameters["targeted_kept"] / report.parameters["targeted_dense"]
    feasible = [probe["param_ratio"] for probe in report.probes if probe["feasible"]]
    refused = [probe["param_ratio"] for probe in report.probes if not probe["feasible"]]
    assert kept == min(feasible)
    assert 0 < kept - max(refused) < 0.02
    assert all(probe["measured"] > 0.1 for probe in report.probes if not probe["feasible"])


def test_larger_tolerance_gives_a_smaller_model(text):
    kept = [
        compress(
            tiny_llama(),
            LowRankConfig(loss_tolerance=tolerance),
            text[:6],
            held_out=text[6:10],
            progress=False,
        ).parameters["kept"]
        for tolerance in (0.02, 0.1, 0.4)
    ]
    assert kept[0] > kept[1] > kept[2]


def test_held_out_text_is_taken_off_the_calibration_text(text):
    config = LowRankConfig(loss_tolerance=0.2)
    report = compress(tiny_llama(), config, text[:8], progress=False)
    explicit = compress(tiny_llama(), config, text[:6], held_out=text[6:8], progress=False)
    assert report.data["calibration_tokens"] == 6 * 4 * 16
    assert report.held_out == explicit.held_out
    assert report.ranks == explicit.ranks


def test_a_tolerance_that_nothing_meets_gives_the_dense_model(text):
    def strict_loss(model, batch):
        losses = item_losses(model, batch)
        return losses if is_dense(model) else ItemLosses(losses.sums + 100.0, losses.counts)

    model = tiny_llama()
    report = compress(
        model,
        LowRankConfig(loss_tolerance=0.0),
        text[:4],
        held_out=text[6:8],
        loss_function=strict_loss,
        progress=False,
    )
    assert set(report.ranks.values()) == {None}
    assert report.held_out["mean"] == 0
    assert equal_states(state(model), state(tiny_llama()))


# Refusals


def test_a_metric_without_its_data_is_refused():
    model = tiny_llama()
    with pytest.raises(DataError, match=r"metric 'kfac' needs calibration data; .* 'plain'"):
        compress(model, LowRankConfig(param_ratio=0.5), progress=False)
    assert is_dense(model)


@pytest.mark.parametrize("batches", [None, token_batches(1)])
def test_a_tolerance_without_held_out_text_is_refused(batches):
    with pytest.raises(DataError, match="at least two calibration batches, or held_out"):
        compress(tiny_llama(), LowRankConfig(), batches, progress=False)


def test_an_empty_held_out_text_is_refused():
    with pytest.raises(DataError, match="holds nothing to score"):
        compress(tiny_llama(), LowRankConfig(metric="plain"), held_out=[], progress=False)


def test_a_budget_below_the_smallest_ranks_is_refused_with_numbers():
    config = LowRankConfig(param_ratio=0.2, metric="plain", min_rank=8)
    with pytest.raises(ConfigError, match=r"0\.2 allows \d+ parameters, but .*min_rank 8.* need"):
        compress(tiny_llama(), config, progress=False)


def test_classifier_without_labels_is_refused():
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in token_batches(2)]
    with pytest.raises(DataError, match="no 'labels', which BertForSequenceClassification needs"):
        compress(tiny_bert_classifier(), LowRankConfig(param_ratio=0.5), batches, progress=False)


def test_labels_drawn_from_the_model_need_none_in_the_data():
    config = LowRankConfig(param_ratio=0.5, label_source="model")
    assert compress(tiny_bert_classifier(), config, token_batches(2), progress=False).ranks


# Failures of single layers


def model_with_nan():
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(NAN_LAYER).weight[3, 5] = float("nan")
    return model


def test_a_layer_with_nan_stays_dense_and_is_named():
    model = model_with_nan()
    report = compress(model, LowRankConfig(param_ratio=0.7, metric="plain"), progress=False)
    assert report.failures == {NAN_LAYER: "the weight holds NaN or infinity"}
    assert report.ranks[NAN_LAYER] is None
    assert isinstance(model.get_submodule(NAN_LAYER), nn.Linear)
    assert sum(rank is not None for rank in report.ranks.values()) == 13
    assert report.parameters["targeted_kept"] <= 0.7 * report.parameters["targeted_dense"]


def test_a_model_whose_loss_is_nan_is_refused_untouched(text):
    model = model_with_nan()
    with pytest.raises(NumericalError, match="calibration loss is nan"):
        compress(model, LowRankConfig(param_ratio=0.7), text[:2], progress=False)
    assert is_dense(model)
    assert num_hooks(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


# What is left behind


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mixtral])
def test_hooks_flags_and_modes_are_as_before(build):
    model = build().train()
    frozen = next(model.parameters()).requires_grad_(False)
    compress(model, LowRankConfig(param_ratio=0.6), batches_for(model), progress=False)
    assert num_hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_exception_halfway_leaves_the_dense_model_without_hooks(text):
    model = tiny_llama().train()
    before = state(model)
    config = LowRankConfig(param_ratio=0.6)
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        compress(model, config, text[:4], loss_function=CountingLoss(2), progress=False)
    assert num_hooks(model) == 0
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert equal_states(state(model), before)


def test_the_user_s_own_hooks_survive(text):
    model, seen = tiny_llama(), []
    model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    compress(model, LowRankConfig(param_ratio=0.6), text[:2], progress=False)
    assert num_hooks(model) == 1
    assert seen


def test_random_state_is_left_alone(text):
    config = LowRankConfig(param_ratio=0.6, label_source="model")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compress(tiny_llama(), config, text[:2], progress=False)
    assert torch.equal(torch.rand(3), expected)


# Negative controls


def randomize_factors_(model):
    """Random input directions in place of the chosen ones; the best use is made of them."""
    generator = torch.Generator().manual_seed(0)
    dense = tiny_llama()
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            shape = layer.in_features, layer.rank
            basis = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
            with torch.no_grad():
                layer.lowrank_A.weight.copy_(basis.T)
                layer.lowrank_B.weight.copy_(dense.get_submodule(name).weight @ basis)


@pytest.mark.parametrize("metric", ["kfac", "whitened", "plain"])
def test_random_factors_of_the_same_ranks_are_worse(text, metric):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.8, metric=metric)
    report = compress(model, config, text[:8], text[8:], progress=False)
    randomize_factors_(model)
    control = mean_loss(model, text[8:]) - report.evaluation.loss_before
    assert control > report.evaluation.loss_difference + 0.2


def test_prediction_is_near_the_measured_rise(text):
    many = written_batches(tiny_llama(), num_batches=40, seed=1)
    config = LowRankConfig(param_ratio=0.9)
    report = compress(tiny_llama(), config, many, text, progress=False)
    measured = report.evaluation.loss_difference
    assert measured > 0.01
    assert 0.5 < report.predicted_loss_difference / measured < 2


def test_a_metric_without_prices_predicts_nothing():
    config = LowRankConfig(param_ratio=0.6, metric="plain")
    assert compress(tiny_llama(), config, progress=False).predicted_loss_difference is None


# Sweeps


def test_sweep_gives_what_single_runs_give(text):
    model, ratios = tiny_llama(), [0.4, 0.8]
    config = LowRankConfig(loss_tolerance=0.1)
    for report, ratio in zip(
        sweep(model, config, ratios, text[:4], text[8:9], progress=False), ratios, strict=True
    ):
        single = tiny_llama()
        expected = compress(
            single, LowRankConfig(param_ratio=ratio), text[:4], text[8:9], progress=False
        )
        assert report.ranks == expected.ranks
        assert report.config == expected.config
        assert report.evaluation == expected.evaluation
        assert equal_states(state(model), state(single))


def test_sweep_restores_the_dense_model_between_and_after(text):
    model = tiny_llama()
    before, modules = state(model), dict(model.named_modules())
    seen = []

    def loss_function(model, batch):
        seen.append(is_dense(model))
        return item_losses(model, batch)

    for _ in sweep(
        model,
        LowRankConfig(),
        [0.3, 0.6],
        text[:2],
        text[8:9],
        loss_function=loss_function,
        progress=False,
    ):
        assert not is_dense(model)
        assert model.config.quantization_config.ranks
    # Two calibration batches and one evaluation on the dense model, then one at each size.
    assert seen == [True, True, True, False, False]
    assert equal_states(state(model), before)
    assert dict(model.named_modules()) == modules
    assert not hasattr(model.config, "quantization_config")
    assert "save_pretrained" not in vars(model)


def test_sweep_restores_the_model_when_its_consumer_raises(text):
    model = tiny_llama()
    before = state(model)

    def consume():
        for _ in sweep(model, LowRankConfig(metric="plain"), [0.5, 0.7], progress=False):
            raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    assert equal_states(state(model), before)
    assert not hasattr(model.config, "quantization_config")


def test_sweep_restores_the_model_when_the_evaluation_fails(text):
    model = tiny_llama()
    before = state(model)
    # Two calibration batches, one dense evaluation; the fourth call is on the compressed model.
    runs = sweep(
        model,
        LowRankConfig(),
        [0.5],
        text[:2],
        text[8:9],
        loss_function=CountingLoss(4),
        progress=False,
    )
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        next(runs)
    assert equal_states(state(model), before)
    assert not hasattr(model.config, "quantization_config")


def test_sweep_can_be_left_early(text):
    model = tiny_llama()
    runs = sweep(model, LowRankConfig(metric="plain"), [0.5, 0.7], progress=False)
    next(runs)
    assert not is_dense(model)
    runs.close()
    assert is_dense(model)


def test_sweep_checks_every_ratio_before_it_starts():
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"must lie in \(0, 1\], got 1\.5"):
        next(sweep(model, LowRankConfig(metric="plain"), [0.5, 1.5], progress=False))
    assert is_dense(model)


def test_sweep_over_no_ratio_gives_no_report():
    assert list(sweep(tiny_llama(), LowRankConfig(metric="plain"), [], progress=False)) == []


# The cache


def run_cached(folder, text, build=tiny_llama, **settings):
    model, loss = build(), CountingLoss()
    config = LowRankConfig(param_ratio=0.6, **settings)
    report = compress(model, config, text, loss_function=loss, cache_dir=folder, progress=False)
    return report, state(model), loss.calls


@pytest.fixture
def cached(text, tmp_path):
    """A filled cache folder, and the run that filled it."""
    return tmp_path / "cache", run_cached(tmp_path / "cache", text[:3])


def test_a_second_run_reads_the_spectra(cached, text):
    folder, (report, expected, calls) = cached
    again, found, calls_again = run_cached(folder, text[:3])
    assert (calls, calls_again) == (3, 0)
    assert "statistics" in report.seconds
    assert {"statistics", "decomposition"}.isdisjoint(again.seconds)
    assert again.ranks == report.ranks
    assert equal_states(found, expected)


def test_another_goal_reads_the_same_spectra(cached, text):
    model, loss = tiny_llama(), CountingLoss()
    config = LowRankConfig(rank=4)
    compress(model, config, text[:3], loss_function=loss, cache_dir=cached[0], progress=False)
    assert loss.calls == 0


def test_another_damping_reads_the_same_moments(cached, text):
    report, _, calls = run_cached(cached[0], text[:3], input_damping=0.3)
    assert calls == 0
    assert "decomposition" in report.seconds


@pytest.mark.parametrize("change", ["text", "model", "seed", "metric"])
def test_other_inputs_are_measured_anew(cached, text, change):
    batches = text[3:6] if change == "text" else text[:3]
    settings = {"seed": {"seed": 1}, "metric": {"metric": "fisher-rows"}}.get(change, {})
    build = (lambda: tiny_llama(seed=1)) if change == "model" else tiny_llama
    assert run_cached(cached[0], batches, build, **settings)[2] == 3


@pytest.mark.parametrize("kind", ["spectra", "moments"])
def test_half_written_temporary_files_are_ignored(cached, text, kind):
    folder, (_, expected, _) = cached
    (file,) = folder.glob(f"{kind}-*.safetensors")
    data = file.read_bytes()
    for path in folder.iterdir():
        path.unlink()
    file.with_name(f"{file.name}.tmp-12345").write_bytes(data[: len(data) // 2])
    _, found, calls = run_cached(folder, text[:3])
    assert calls == 3
    assert equal_states(found, expected)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"{}"])
@pytest.mark.parametrize("kind", ["spectra", "moments"])
def test_a_damaged_file_is_computed_again(cached, text, kind, damage):
    folder, (_, expected, _) = cached
    (file,) = folder.glob(f"{kind}-*.safetensors")
    if kind == "moments":
        (folder / next(folder.glob("spectra-*")).name).unlink()
    file.write_bytes(damage(file.read_bytes()))
    report, found, calls = run_cached(folder, text[:3])
    assert calls == (0 if kind == "spectra" else 3)
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
    assert all(path.suffix == ".safetensors" for path in cached[0].iterdir())


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
        results.append((report.ranks, state(model), loss.calls))
    assert results[0][0] == results[1][0] == results[2][0]
    for name, tensor in results[0][1].items():
        for other in results[1:]:
            torch.testing.assert_close(other[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    if label_source == "data":
        passes = [calls / 3 for _, _, calls in results]
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


# Other ways in


def test_get_lowrank_model_returns_the_same_model_ready_to_train(text):
    model = tiny_llama().train()
    config = LowRankConfig(param_ratio=0.6)
    assert get_lowrank_model(model, config, text[:2], progress=False) is model
    assert not is_dense(model)
    assert model.training
    model(**text[0], labels=text[0]["input_ids"]).loss.backward()
    factors = [p for n, p in model.named_parameters() if "lowrank_" in n]
    assert factors
    assert all(parameter.grad.abs().sum() > 0 for parameter in factors)


def test_get_lowrank_model_without_data():
    model = get_lowrank_model(tiny_gpt2(), LowRankConfig(rank=3, metric="plain"), progress=False)
    ranks = {m.rank for m in model.modules() if isinstance(m, LowRankLinear)}
    assert ranks == {3}


def test_a_module_from_outside_transformers_is_compressed_with_its_own_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Linear(24, 5))
    inputs = torch.randn(8, 16, 24)
    batches = [{"x": x, "y": torch.randint(0, 5, (16,))} for x in inputs]

    def loss_function(model, batch):
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return ItemLosses(losses, torch.ones_like(batch["y"]))

    report = compress(
        model,
        LowRankConfig(param_ratio=0.5),
        batches[:6],
        batches[6:],
        loss_function=loss_function,
        progress=False,
    )
    assert set(report.ranks) == {"0", "2"}
    assert isinstance(model[0], LowRankLinear)
    assert isinstance(model[3], nn.Linear)
    assert report.parameters["targeted_kept"] <= 0.5 * 2 * 24 * 32
    assert report.evaluation.tokens == 32
    assert hf_lowrank.merge(model) is model
    assert is_dense(model)


def test_a_decision_is_replayed():
    batches = token_batches(4, 2, 16)
    first = compress(tiny_llama(), LowRankConfig(param_ratio=0.6), batches, progress=False)
    assert len(set(first.ranks.values())) > 1
    config = LowRankConfig(metric="plain", ranks=first.ranks)
    assert compress(tiny_llama(), config, progress=False).ranks == first.ranks

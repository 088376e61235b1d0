"""`LowRankConfig`: what it refuses, and that it survives JSON."""

import dataclasses
import json
import math
import re
from dataclasses import replace

import pytest
import torch

from hf_lowrank import LowRankConfig
from hf_lowrank.config import METRIC_NAMES, READERS, RULE_NAMES
from hf_lowrank.decomposition.metrics import METRICS, MetricSettings
from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.errors import CheckpointError, ConfigError, LowRankError
from hf_lowrank.ranks.rules import RULES


@pytest.mark.parametrize("value", [0, -0.5, 1.01, math.nan, math.inf, "0.8", True])
def test_param_ratio_must_be_a_share(value):
    with pytest.raises(ConfigError, match=rf"must lie in \(0, 1\], got {value!r}\."):
        LowRankConfig(param_ratio=value)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "small"])
def test_loss_tolerance_must_be_finite_and_not_negative(value):
    with pytest.raises(ConfigError, match=rf"must be a number >= 0 \(nats\), got {value!r}\."):
        LowRankConfig(loss_tolerance=value)


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4"])
@pytest.mark.parametrize("name", ["rank", "min_rank"])
def test_ranks_must_be_whole_numbers(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be an integer >= 1, got {value!r}\."):
        LowRankConfig(**{name: value})


@pytest.mark.parametrize("field", ["rank_pattern", "ranks"])
def test_ranks_by_layer_are_checked_by_name(field):
    with pytest.raises(ConfigError, match=rf"{field}\['q_proj'\] must be an integer >= 1, got 0"):
        LowRankConfig(**{field: {"k_proj": None, "q_proj": 0}})


def test_two_goals_are_refused():
    with pytest.raises(ConfigError, match="one goal, not 2: param_ratio and rank are set"):
        LowRankConfig(param_ratio=0.5, rank=4)


def test_a_goal_of_zero_tolerance_counts_as_a_goal():
    with pytest.raises(ConfigError, match="param_ratio and loss_tolerance are set"):
        LowRankConfig(param_ratio=0.5, loss_tolerance=0)


@pytest.mark.parametrize("name", ["metric", "rule", "label_source", "form"])
def test_unknown_choices_are_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=rf"^{name} must be one of [a-z, -]+; got 'nonsense'\."):
        LowRankConfig(**{name: "nonsense"})


def test_price_needs_the_metric_that_has_prices():
    with pytest.raises(ConfigError, match=r"rule 'price' needs metric 'kfac'.* 'whitened'"):
        LowRankConfig(metric="whitened", rule="price")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "whitened"}, r"need metric 'kfac' and rule 'price'; got metric 'whitened'"),
        ({"rule": "relative"}, r"got metric 'kfac' and rule 'relative'"),
        (
            {"rank": 4},
            r"^channels=True would do nothing with goal 'rank': it is read with goal par",
        ),
        ({"channels": "yes"}, r"^channels must be true, false or left open, got 'yes'\."),
    ],
)
def test_channels_need_prices_and_a_goal_that_trades(settings, message):
    with pytest.raises(ConfigError, match=message):
        LowRankConfig(**({"channels": True} | settings))


@pytest.mark.parametrize(
    ("narrowed", "message"),
    [
        ([3, 4], r"^narrowed must map names to shapes"),
        ({"a": 3}, r"^narrowed\['a'\] must be \[out_features, in_features\], got 3"),
        ({"a": [3]}, r"^narrowed\['a'\] must be \[out_features, in_features\], got \[3\]"),
        ({"a": [3, 0]}, r"^narrowed\['a'\] must be \[out_features, in_features\], got \[3, 0\]"),
        ({"a": [3, True]}, r"^narrowed\['a'\] must be \[out_features, in_features\], got \[3, T"),
        ({"b": [3, 4]}, r"^b has both a rank and a narrowed shape"),
    ],
)
def test_shapes_of_narrowed_layers_are_checked(narrowed, message):
    with pytest.raises(ConfigError, match=message):
        LowRankConfig(ranks={"a": None, "b": 2}, narrowed=narrowed)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "0.1"])
@pytest.mark.parametrize("name", ["input_damping", "output_damping"])
def test_damping_must_not_be_negative(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be a number >= 0, got {value!r}"):
        LowRankConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_activation_alpha_must_be_a_share(value):
    with pytest.raises(ConfigError, match=rf"activation_alpha must lie in .* got {value!r}"):
        LowRankConfig(activation_alpha=value)


@pytest.mark.parametrize("value", [["q_proj", 3], 5])
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_layer_names_must_be_text(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be a list of names, got"):
        LowRankConfig(**{name: value})


def test_one_layer_name_becomes_a_list():
    assert LowRankConfig(target_modules="q_proj").target_modules == ["q_proj"]


def test_config_errors_are_value_errors_of_the_package():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, LowRankError)


def test_default_is_a_small_loss_tolerance_in_the_priced_metric():
    config = LowRankConfig()
    assert (config.goal, config.effective_tolerance) == ("loss_tolerance", 0.05)
    assert (config.metric, config.effective_rule) == ("kfac", "price")


@pytest.mark.parametrize(
    ("settings", "goal"),
    [
        ({"param_ratio": 0.5}, "param_ratio"),
        ({"rank": 3}, "rank"),
        ({"loss_tolerance": 0.0}, "loss_tolerance"),
    ],
)
def test_goal_names_what_is_set(settings, goal):
    assert LowRankConfig(**settings).goal == goal


def test_explicit_tolerance_of_zero_is_in_force():
    assert LowRankConfig(loss_tolerance=0).effective_tolerance == 0


@pytest.mark.parametrize("metric", [name for name in METRIC_NAMES if name != "kfac"])
def test_metrics_without_prices_get_uniform_ranks(metric):
    assert LowRankConfig(metric=metric).effective_rule == "uniform"


def test_named_metrics_and_rules_are_those_that_exist():
    assert set(METRIC_NAMES) == set(METRICS)
    assert set(RULE_NAMES) == set(RULES)


def test_replace_checks_the_result():
    with pytest.raises(ConfigError, match="one goal"):
        LowRankConfig(param_ratio=0.5).replace(rank=2)


def test_configs_do_not_share_their_defaults():
    LowRankConfig().rank_pattern["q_proj"] = 3
    assert LowRankConfig().rank_pattern == {}


def test_every_setting_survives_json():
    config = LowRankConfig(
        param_ratio=0.7,
        metric="whitened",
        rule="energy",
        target_modules=["q_proj"],
        exclude_modules=["layers.0.*"],
        rank_pattern={"q_proj": 4, "k_proj": None},
        min_rank=2,
        input_damping=0.5,
        output_damping=0.25,
        activation_alpha=0.75,
        label_source="model",
        seed=7,
        ranks={"a": 3, "b": None},
        narrowed={"b": [5, 8]},
        weights="int4",
        quantized={"b": {"bits": 4, "block": [1, 8]}},
        experts={"c": {"experts": 2, "width": 8}},
        form="usv",
    )
    changed = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    assert len(changed) == len(dataclasses.fields(config)) - len(
        [
            "loss_tolerance",
            "megabytes",
            "rank",
            "channels",
            "channels_only",
            "measured_prices",
            "objective",
            "format_version",
            "quant_method",
        ]
    )
    prices = LowRankConfig(channels=True, measured_prices=True, objective="latency")
    assert LowRankConfig.from_dict(json.loads(json.dumps(prices.to_dict()))) == prices
    assert LowRankConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LowRankConfig.from_dict(json.loads(config.to_json_string())) == config


def test_to_dict_is_a_copy():
    config = LowRankConfig(ranks={"a": 3})
    config.to_dict()["ranks"]["a"] = 4
    assert config.ranks == {"a": 3}


def test_from_dict_returns_unused_keywords_when_asked():
    config, unused = LowRankConfig.from_dict(
        {"format_version": 1, "rank": 2}, return_unused_kwargs=True, other=5
    )
    assert (config.rank, unused) == (2, {"other": 5})


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_other_format_versions_are_refused(version):
    with pytest.raises(
        CheckpointError, match=f"format_version {version!r}, .* reads 1, 2, 3; update"
    ):
        LowRankConfig.from_dict({"format_version": version})


def test_missing_format_version_is_refused():
    with pytest.raises(CheckpointError, match="format_version None"):
        LowRankConfig.from_dict({"rank": 3})


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(CheckpointError, match="unknown low-rank settings alpha, beta;"):
        LowRankConfig.from_dict({"format_version": 1, "beta": 1, "alpha": 2})


def test_records_of_searches_that_are_no_more_are_read():
    """Older versions searched ranks in the package, and wrote how into every checkpoint."""
    record = {"format_version": 1, "rule": "bayes-types", "search_trials": 24, "ranks": {"a": 3}}
    config = LowRankConfig.from_dict(record)
    assert (config.rule, config.ranks) == ("bayes-types", {"a": 3})
    assert "search_trials" not in config.to_dict()
    with pytest.raises(ConfigError, match=r"^rule must be one of uniform, .*; got 'bayes-types'"):
        LowRankConfig(rule="bayes-types")


@pytest.mark.parametrize("value", ["no", 1])
def test_channels_only_is_a_truth_value(value):
    with pytest.raises(ConfigError, match="channels_only must be true, false or left open, got"):
        LowRankConfig(channels_only=value)


def test_every_setting_has_a_help_text():
    for field in dataclasses.fields(LowRankConfig):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize("value", [None, ["q_proj"], {0: 2}])
def test_rank_pattern_must_map_names_to_ranks(value):
    with pytest.raises(ConfigError, match="rank_pattern must"):
        LowRankConfig(rank_pattern=value)


@pytest.mark.parametrize("value", ["abc", 1.0, True, None, -1, 2**32])
def test_a_seed_is_an_integer_that_every_generator_takes(value):
    with pytest.raises(ConfigError, match=rf"^seed must be an integer from 0 to .*, got {value!r}"):
        LowRankConfig(seed=value)


# One example of each setting that something else can leave nothing to do.
IGNORED = {
    "rule": (
        {"rank": 2},
        "energy",
        r"with goal 'rank': .* param_ratio or .* or megabytes\.",
    ),
    "min_rank": (
        {"rank": 2},
        8,
        r"with goal 'rank': .* param_ratio or .* or megabytes\.",
    ),
    "channels": ({"rank": 2}, True, "with goal 'rank'"),
    "channels_only": ({"megabytes": 2}, True, "with goal 'megabytes': .* param_ratio or loss_tol"),
    "measured_prices": ({"rank": 2}, True, "with goal 'rank'"),
    "objective": ({"rank": 2}, "parameters", "with goal 'rank': .* param_ratio or loss_tol"),
    "input_damping": ({"metric": "plain"}, 5.0, "with metric 'plain': .* whitened or pooled"),
    "output_damping": ({"metric": "whitened"}, 5.0, r"with metric 'whitened': .* metric kfac\."),
    "activation_alpha": ({}, 0.75, "with metric 'kfac': it is read with metric activation-scale"),
    "label_source": ({"metric": "pooled"}, "model", "with metric 'pooled': .*fisher-rows or kfac"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_setting_that_would_do_nothing_is_refused(name):
    settings, value, message = IGNORED[name]
    start = re.escape(f"{name}={value!r} would do nothing ")
    with pytest.raises(ConfigError, match=f"^{start}{message}.* Leave it out, or choose such a"):
        LowRankConfig(**settings, **{name: value})


@pytest.mark.parametrize("name", READERS)
def test_the_same_setting_is_accepted_in_a_record(name):
    """Checkpoints written before these were refused hold them, and are replayed."""
    settings, value, _ = IGNORED[name]
    record = LowRankConfig(**settings, ranks={"a": 3}).to_dict() | {name: value}
    assert getattr(LowRankConfig.from_dict(record), name) == value


@pytest.mark.parametrize("name", READERS)
def test_where_it_is_read_a_setting_is_accepted(name):
    _, value, _ = IGNORED[name]
    kind, readers = READERS[name]
    for reader in readers:
        chosen = {reader: 0.5} if kind == "goal" else {"param_ratio": 0.5, kind: reader}
        assert getattr(LowRankConfig(**chosen, **{name: value}), name) == value
    assert (
        set(readers)
        <= {
            "metric": set(METRIC_NAMES),
            "goal": {"param_ratio", "loss_tolerance", "megabytes"},
        }[kind]
    )


@pytest.mark.parametrize("metric", METRIC_NAMES)
@pytest.mark.parametrize("name", [n for n, (kind, _) in READERS.items() if kind == "metric"])
def test_the_table_of_readers_says_what_the_metrics_read(name, metric):
    """Each metric's form, or the statistics that it needs, with and without the setting."""
    is_read = metric in READERS[name][1]
    if name == "label_source":
        assert is_read == bool(METRICS[metric].needs & {"output", "gradient_rows"})
        return
    one = MetricSettings(input_damping=0.3, output_damping=0.2, activation_alpha=0.4)
    forms = [METRICS[metric].form(some_moments(), s) for s in (one, replace(one, **{name: 0.7}))]
    assert (repr(forms[0]) != repr(forms[1])) == is_read


def some_moments():
    second = SecondMoment(torch.eye(2), 2.0, 2)
    return Moments(
        input=second,
        input_centred=second,
        output=second,
        input_abs=torch.tensor([1.0, 4.0]),
        gradient_rows=torch.ones(2),
        tokens=3,
        losses=3,
    )

"""Settings that compress_llm.py refuses: one sentence and exit code 2, before any long work."""

import pytest
import torch

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.config import METRIC_NAMES, RULE_NAMES
from hf_lowrank.errors import ConfigError
from hf_lowrank.inputs import sources
from tests.scripts import InProcess, Inputs, Refusal


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("ratio", ["0", "1.5", "-1", "nan", "inf"])
def test_a_ratio_outside_its_range(refused: Refusal, ratio: str):
    assert refused(param_ratio=ratio) == (
        "param_ratio is the kept share of the parameters and must lie in (0, 1], got "
        f"{float(ratio)}."
    )


@pytest.mark.usefixtures("no_model")
def test_one_of_several_ratios_outside_its_range(refused: Refusal):
    assert "must lie in (0, 1], got 1.5." in refused("--param_ratio", "0.8", "1.5", "0.5")


@pytest.mark.usefixtures("no_model")
def test_the_same_ratio_twice(refused: Refusal):
    assert "0.8" in refused("--param_ratio", "0.8", "0.6", "0.80")


@pytest.mark.usefixtures("no_calibration")
def test_a_sample_prompt_without_tokens(refused: Refusal):
    assert refused(sample_prompt=" ") == "sample_prompt ' ' has no tokens; give another one."


@pytest.mark.usefixtures("no_model")
def test_both_goals_at_once(refused: Refusal):
    assert refused("--loss_tolerance", "0.1") == (
        "Give one goal, not 2: param_ratio and loss_tolerance are set."
    )


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("recover_steps", 5, "joint trains no factors; give no recover_steps."),
        ("recover", "lora", "recover='lora' does nothing without steps; give recover_steps > 0."),
        ("channels", True, "joint takes neither channels nor measured_prices."),
        ("measured_prices", True, "joint takes neither channels nor measured_prices."),
        ("stages", 2, "joint is one cut; give no stages."),
    ],
)
def test_joint_with_a_setting_that_it_would_ignore(
    refused: Refusal, setting: str, value: object, sentence: str
):
    assert refused(joint=True, **{setting: value}) == sentence


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("tolerance", ["-0.1", "nan", "inf"])
def test_a_tolerance_outside_its_range(refused: Refusal, tolerance: str):
    error = refused(param_ratio=None, loss_tolerance=tolerance)
    assert error == f"loss_tolerance must be a number >= 0 (nats), got {float(tolerance)}."


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("metric", "svd", ", ".join(METRIC_NAMES)),
        ("rule", "best", ", ".join(RULE_NAMES)),
        ("label_source", "teacher", "data, model"),
        ("dtype", "int8", "auto, float32, bfloat16, float16"),
    ],
)
def test_an_unknown_choice(refused: Refusal, setting: str, value: str, allowed: str):
    assert refused(**{setting: value}) == f"{setting} must be one of {allowed}; got {value!r}."


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("metric", ["plain", "whitened"])
def test_price_without_the_metric_that_has_prices(refused: Refusal, metric: str):
    error = refused(rule="price", metric=metric)
    assert error.startswith("rule 'price' needs metric 'kfac'")
    assert f"got metric {metric!r}" in error


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("device", ["gpu", "cuda:99", "npu"])
def test_an_unknown_device(refused: Refusal, device: str):
    assert refused(device=device).startswith(f"device '{device}' is not available: ")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "setting", ["calibration_sequences", "evaluation_sequences", "sequence_length", "batch_size"]
)
def test_a_count_that_is_not_positive(refused: Refusal, setting: str, value: int):
    error = refused(**{setting: value})
    assert f"got {value}" in error
    assert setting.split("_")[0] in error


@pytest.mark.usefixtures("no_calibration")
def test_held_out_sequences_that_are_not_positive(refused: Refusal):
    error = refused(param_ratio=None, loss_tolerance=0.1, held_out_sequences=0)
    assert "held_out" in error
    assert "got 0" in error


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "setting",
    [
        "calibration_sequences",
        "evaluation_sequences",
        "sequence_length",
        "batch_size",
        "recover_steps",
    ],
)
def test_a_negative_count_is_refused_before_the_model_is_loaded(refused: Refusal, setting: str):
    assert "got -2" in refused(**{setting: -2})


@pytest.mark.usefixtures("no_calibration")
def test_one_token_has_nothing_to_predict(refused: Refusal):
    assert "got 1" in refused(sequence_length=1)


@pytest.mark.usefixtures("no_calibration")
def test_a_rank_above_its_layers_limit(inputs: Inputs):
    model, _ = sources.load_causal_lm(str(inputs.model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj: rank 40 exceeds min\(32, 32\)"
    ):
        hf_lowrank.compress(model, LowRankConfig(rank=40, metric="plain"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("no_calibration")
def test_a_fixed_rank_above_its_layers_limit(inputs: Inputs):
    model, _ = sources.load_causal_lm(str(inputs.model))
    config = LowRankConfig(param_ratio=0.5, metric="plain", rank_pattern={"1.mlp.up_proj": 33})
    with pytest.raises(
        ConfigError, match=r"model\.layers\.1\.mlp\.up_proj: rank 33 exceeds min\(64, 32\)"
    ):
        hf_lowrank.compress(model, config)


@pytest.mark.usefixtures("no_calibration")
def test_a_budget_below_the_smallest_ranks(refused: Refusal):
    error = refused(param_ratio=0.001)
    rank_one = 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert error.startswith("param_ratio 0.001 allows 18 parameters")
    assert f"need {rank_one}" in error


@pytest.mark.usefixtures("no_calibration")
def test_one_of_several_budgets_below_the_smallest_ranks(refused: Refusal):
    error = refused("--param_ratio", "0.8", "0.002", param_ratio=None)
    assert error.startswith("param_ratio 0.002 allows 36 parameters")


@pytest.mark.usefixtures("no_model")
def test_an_unknown_option(compress_llm: InProcess, inputs: Inputs):
    done = compress_llm(*inputs.arguments(), "--param_ration", "0.5")
    assert done.code == 2
    assert "--param_ration" in done.messages[-1]


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_a_pattern_that_matches_no_layer(refused: Refusal, setting: str):
    error = refused(**{setting: "c_attn"})
    assert error.startswith(f"{setting}: 'c_attn' matches no linear layer")
    assert "q_proj" in error


@pytest.mark.usefixtures("no_calibration")
def test_no_layer_is_left(refused: Refusal):
    error = refused(target_modules="q_proj", exclude_modules="model.*")
    assert error.startswith("No linear layer of LlamaForCausalLM is left to factorize")

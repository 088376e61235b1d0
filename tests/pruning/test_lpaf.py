"""The whole of LPAF: its three stages, each left out, killed between, and resumed."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import default_data_collator

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import CheckpointError, ConfigError, DataError
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.pruning import lpaf
from hf_lowrank.pruning.lpaf import STAGES, LpafSettings, lpaf_
from hf_lowrank.pruning.lpaf_report import LpafReport, Overheads
from tests.tiny_models import NUM_LABELS, logits, sentence_batches, tiny_bert_classifier
from tests.training import sentence_rows

COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "num_train_epochs": 2,
    "use_cpu": True, "eval_strategy": "epoch", "disable_tqdm": True, "logging_steps": 100,
}  # fmt: skip
INPUTS = {n: t for n, t in sentence_batches(1)[0].items() if n != "labels"}


def lpaf_settings(metric: str = "sparsity", **changes: Any) -> LpafSettings:
    goal = changes.pop("goal", {"param_ratio": 0.4})
    values = {"pruning": {"mask_interval": 2, "final_density": 0.3}, "training": COMMON, **changes}
    return LpafSettings(LowRankConfig(**goal, metric=metric), **values)


def run(settings: LpafSettings, **options: Any) -> tuple[Any, LpafReport]:
    model = options.pop("model", None) or tiny_bert_classifier()
    found = lpaf_(model, sentence_rows(), default_data_collator, settings, **options)
    return model, found


def same(one: Any, two: Any) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_one_call_prunes_factorizes_and_fine_tunes(tmp_path: Path):
    stages = []
    model, report = run(lpaf_settings(), on_stage=lambda stage, model: stages.append(stage))
    assert tuple(stages) == STAGES
    assert report.density == pytest.approx(0.3, abs=1e-3)
    assert report.parameters.targeted_kept <= 0.4 * report.parameters.targeted_dense
    layers = factorized_layers(model)
    assert {n: layer.rank for n, layer in layers.items()} == report.ranks
    assert {type(layer) for layer in layers.values()} == {LowRankLinear}
    assert set(report.seconds) == set(STAGES)
    assert report.overheads.pruning.bytes > 0
    assert report.overheads.fine_tuning.sparse_bytes > 0
    assert len(report.numerical_ranks.layers) == 12
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf_lowrank.load(tmp_path), INPUTS), logits(model, INPUTS))


@pytest.mark.parametrize("work_dir", [None, "kept"])
def test_a_model_that_is_refused_after_the_pruning_stays_pruned(
    tmp_path: Path, work_dir: str | None
):
    told: list[str] = []

    def refuse(stage: str, model: Any) -> bool:
        told.append(stage)
        return False

    folder = tmp_path / work_dir if work_dir else None
    for _ in range(2):
        model, report = run(lpaf_settings(), on_stage=refuse, work_dir=folder)
        assert not factorized_layers(model)
        assert not model.training
        assert report.density == pytest.approx(0.3, abs=1e-3)
        assert set(report.seconds) == {"pruned"}
        assert report.overheads.fine_tuning is None
        assert (report.ranks, report.parameters, report.compression) == (None, None, None)
    assert told == ["pruned", "pruned"]
    assert report.restored == (["pruned"] if work_dir else [])


def test_a_teacher_is_met_in_the_stages_that_give_it_a_weight():
    def ends(pruning: float, fine_tuning: float) -> list[dict[str, torch.Tensor]]:
        found = []
        changes = {
            name: {"distillation_weight": weight, "max_steps": 4, "final_density": 0.3}
            for name, weight in (("pruning", pruning), ("fine_tuning", fine_tuning))
        }
        del changes["fine_tuning"]["final_density"]
        run(
            lpaf_settings(**changes), teacher=tiny_bert_classifier(seed=1),
            on_stage=lambda stage, model: found.append(copy.deepcopy(model.state_dict())),
        )  # fmt: skip
        return [found[0], found[2]]

    without, pruning, tuning = ends(0.0, 0.0), ends(1.0, 0.0), ends(0.0, 1.0)
    for place, one, two, is_same in (
        (0, without, pruning, False), (0, without, tuning, True), (1, without, tuning, False),
    ):  # fmt: skip
        equal = all(torch.equal(tensor, two[place][name]) for name, tensor in one[place].items())
        assert equal == is_same


def test_runs_with_another_teacher_share_no_stage(tmp_path: Path):
    settings = lpaf_settings(training=COMMON | {"distillation_weight": 0.5, "max_steps": 2})
    for seed in (1, 2):
        _, report = run(settings, teacher=tiny_bert_classifier(seed=seed), work_dir=tmp_path)
        assert report.restored == []


@pytest.mark.parametrize(
    ("metric", "goal"),
    [
        ("plain", {"param_ratio": 0.4}),
        ("sparsity-whitened", {"rank": 5}),
        ("kfac", {"param_ratio": 0.4}),
        ("sparsity", {"loss_tolerance": 0.5}),
    ],
)
def test_metrics_and_goals_of_the_library_apply(
    metric: str, goal: dict[str, float], tmp_path: Path
):
    model, report = run(
        lpaf_settings(metric, goal=goal), calibration=sentence_batches(4),
        held_out=sentence_batches(2, seed=5), work_dir=tmp_path,
    )  # fmt: skip
    assert factorized_layers(model)
    assert (report.compression.held_out is not None) == ("loss_tolerance" in goal)


def test_batches_are_read_once_and_may_be_lists_of_numbers(tmp_path: Path):
    texts = sentence_batches(4)
    rows = ({name: tensor.tolist() for name, tensor in batch.items()} for batch in texts)
    settings = lpaf_settings("kfac", fine_tuning={"num_train_epochs": 0})
    expected, _ = run(settings, calibration=texts, work_dir=tmp_path / "one")
    model, report = run(settings, calibration=rows, work_dir=tmp_path / "two")
    assert same(model, expected)
    _, again = run(settings, calibration=texts, work_dir=tmp_path / "two")
    assert (report.restored, again.restored) == ([], list(STAGES))


def test_a_bad_batch_is_refused_before_the_pruning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lpaf, "PruningTrainer", None)
    text = {"input_ids": [[1, 2], None], "labels": [0, 1]}
    with pytest.raises(DataError, match=r"held_out, batch 0: 'input_ids', row 1, is null"):
        run(lpaf_settings(), held_out=[text])


def test_without_pruning_the_given_weights_are_factorized():
    model, expected = tiny_bert_classifier(), tiny_bert_classifier()
    _, report = run(
        lpaf_settings("plain", prune=False, fine_tuning={"num_train_epochs": 0}), model=model
    )
    hf_lowrank.compress(expected, LowRankConfig(param_ratio=0.4, metric="plain"), progress=False)
    assert report.density == 1.0
    assert report.overheads == Overheads(None, None)
    assert same(model, expected)


def test_without_mixed_rank_the_last_stage_is_plain_fine_tuning():
    mixed, _ = run(lpaf_settings())
    model, report = run(lpaf_settings(mixed_rank=False))
    assert report.overheads.fine_tuning.sparse_bytes == 0
    assert report.overheads.fine_tuning.mixed_step_seconds is None
    assert not same(mixed, model)


def test_held_out_examples_keep_the_best_epoch():
    """Training raises the loss on wrong labels, so there the start is the best."""
    cut, _ = run(lpaf_settings(fine_tuning={"num_train_epochs": 0}))
    wrong = [{**row, "labels": (row["labels"] + 1) % NUM_LABELS} for row in sentence_rows()]
    kept, report = run(lpaf_settings(), eval_dataset=wrong)
    assert same(kept, cut)
    batch = default_data_collator(wrong)
    assert report.held_out_loss == pytest.approx(float(cut(**batch).loss.detach()), rel=1e-4)
    trained, _ = run(lpaf_settings(), eval_dataset=sentence_rows())
    assert not same(trained, cut)


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("killed_after", STAGES[:2])
def test_a_killed_run_goes_on_after_its_last_finished_stage(tmp_path: Path, killed_after: str):
    def kill(stage: str, model: Any) -> None:
        if stage == killed_after:
            raise Killed

    whole, _ = run(lpaf_settings())
    with pytest.raises(Killed):
        run(lpaf_settings(), work_dir=tmp_path, on_stage=kill)
    model, report = run(lpaf_settings(), work_dir=tmp_path)
    assert report.restored == list(STAGES[: STAGES.index(killed_after) + 1])
    assert same(model, whole)
    told: list[str] = []
    again, finished = run(
        lpaf_settings(), work_dir=tmp_path, on_stage=lambda stage, model: told.append(stage)
    )
    assert tuple(told) == STAGES
    assert finished.restored == list(STAGES)
    assert same(again, whole)
    assert finished.ranks == report.ranks
    assert finished.seconds == report.seconds


def test_stages_are_shared_by_runs_that_differ_later_and_by_no_others(tmp_path: Path):
    none = {"fine_tuning": {"num_train_epochs": 0}}
    run(lpaf_settings(**none), work_dir=tmp_path)
    cases = [
        (lpaf_settings("plain", **none), {}, ["pruned"]),
        (lpaf_settings(), {}, ["pruned", "factorized"]),
        (lpaf_settings(**none, pruning={"final_density": 0.5}), {}, []),
        (lpaf_settings(**none), {"model": tiny_bert_classifier(seed=1)}, []),
    ]
    for settings, options, restored in cases:
        assert run(settings, work_dir=tmp_path, **options)[1].restored == restored


def test_a_damaged_stage_is_refused_by_name(tmp_path: Path):
    run(lpaf_settings(), work_dir=tmp_path)
    (path,) = tmp_path.glob("fine_tuned-*/model.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"fine_tuned-.*can't be loaded .*delete the folder"):
        run(lpaf_settings(), work_dir=tmp_path)


def test_what_would_fail_later_is_refused_at_once():
    model = tiny_bert_classifier()
    settings = lpaf_settings()
    cases = [
        (lpaf_settings("kfac"), DataError, "metric 'kfac' with goal param_ratio needs calibration"),
        (
            lpaf_settings("kfac", goal={"channels": True}),
            ConfigError,
            "takes no channels out; leave",
        ),
        (lpaf_settings(goal={"param_ratio": 0.001}), ConfigError, "param_ratio"),
        (
            lpaf_settings(pruning={"num_train_epochs": 0}),
            ConfigError,
            r"needs max_steps or num_train_epochs > 0",
        ),
        (lpaf_settings(fine_tuning={"distillation_weight": 0.5}), ConfigError, "needs a teacher"),
        (lpaf_settings(pruning={"distillation_weight": 0.5}), ConfigError, "needs a teacher"),
        (dataclasses.replace(settings, pruning={"final_density": 2}), ConfigError, "final_density"),
    ]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for wrong, error, text in cases:
        with pytest.raises(error, match=text):
            run(wrong, model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

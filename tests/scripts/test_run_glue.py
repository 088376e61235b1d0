"""`scripts/run_glue.py` end to end: a tiny encoder, 24 made-up pairs, every kind of method."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

import hf_lowrank
from hf_lowrank.cli.task_command import format_scores
from hf_lowrank.format.rebuild import factorized_layers
from hf_lowrank.pruning.pruned_ranks import mean_ranks, target_weights
from hf_lowrank.report.card.card import model_card
from hf_lowrank.tasks import fine_tuning, methods
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task
from hf_lowrank.tasks.methods import METHODS
from hf_lowrank.tasks.task_arguments import METHOD_NAMES
from hf_lowrank.tasks.task_run import run_task
from hf_lowrank.training import switch
from tests.scripts import WORDS, Finished, InProcess, leftovers, save_encoder
from tests.tiny_models import HIDDEN, INTERMEDIATE

METRICS = {"accuracy", "f1"}


def pairs(size: int, seed: int) -> str:
    """Pairs of sentences in MRPC's format; a paraphrase repeats the words in another order."""
    generator = torch.Generator().manual_seed(seed)
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for number in range(size):
        words = torch.randint(len(WORDS), (6,), generator=generator).tolist()
        other = torch.randint(len(WORDS), (6,), generator=generator).tolist()
        label = number % 3 != 0
        second = words[::-1] if label else other
        texts = [" ".join(WORDS[i] for i in part) for part in (words, second)]
        lines.append(f"{int(label)}\t1\t2\t" + "\t".join(texts))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, the data, and room for the dense models that runs share."""
    folder = tmp_path_factory.mktemp("glue")
    save_encoder(folder / "model")
    (folder / "MRPC").mkdir()
    (folder / "MRPC" / "train.tsv").write_text(pairs(24, 0))
    (folder / "MRPC" / "dev.tsv").write_text(pairs(12, 1))
    return folder


def settings(place: Path, **changes: object) -> dict[str, object]:
    return {
        "model": str(place / "model"),
        "task": "mrpc",
        "data_dir": str(place),
        "cache_dir": str(place / "cache"),
        "dense_epochs": 1,
        "epochs": 1,
        "batch_size": 8,
        "max_length": 32,
        "bf16": False,
        **changes,
    }


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    script = InProcess("run_glue", monkeypatch, capsys)

    def start(**changes: object) -> Finished:
        given = settings(place, **changes)
        return script(*(part for n, v in given.items() if v is not None for part in (f"--{n}", v)))

    return start


@pytest.mark.parametrize(
    ("method", "goal"),
    [
        ("dense", {"epochs": 0}),
        ("kfac", {"param_ratio": 0.5}),
        ("svd", {"param_ratio": 0.5, "epochs": 0}),
        ("kfac-channels", {"param_ratio": 0.5}),
        ("joint", {"param_ratio": 0.5}),
        ("joint", {"loss_tolerance": 0.0, "epochs": 0}),
        ("kfac", {"loss_tolerance": 0.05, "bf16": True}),
        ("rank-selection", {"param_ratio": 0.5}),
        ("rank-selection-price", {"loss_tolerance": 0.05}),
        ("cuttlefish", {"param_ratio": 0.5}),
        ("cuttlefish-kfac", {"param_ratio": 0.5, "epochs": 2, "bf16": True}),
        ("kfac", {"param_ratio": 0.5, "steps": 2, "distillation_weight": 0.5}),
        ("cuttlefish", {"param_ratio": 0.5, "steps": 4, "distillation_weight": 0.5}),
        ("lpaf", {"param_ratio": 0.5, "gate": 0.0}),
        ("lpaf-kfac", {"param_ratio": 0.5, "gate": 0.0, "pruning_start": "pre-trained"}),
        ("lpaf-no-pruning", {"param_ratio": 0.5, "steps": 4, "distillation_weight": 0.5}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_every_kind_of_method_reports_and_saves(
    run: Any, place: Path, method: str, goal: dict[str, Any], tmp_path: Path
):
    output = tmp_path / "output"
    done = run(method=method, output_dir=output, **goal)
    assert done.code == 0, done.err
    assert f"saved to {output}\n" in done.out
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert (report["task"], report["method"], report["seed"]) == ("mrpc", method, 0)
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    for name in ("dense_metrics", "metrics"):
        assert set(report[name]) == METRICS
        assert all(0 <= score <= 1 for score in report[name].values())
    kept, dense = (report["parameters"][f"targeted_{name}"] for name in ("kept", "dense"))
    assert dense == 2 * (4 * HIDDEN**2 + 2 * HIDDEN * INTERMEDIATE)
    assert f"kept {kept:,} targeted parameters ({kept / dense:.2%})" in done.out
    assert all(type(value) is float and value >= 0 for value in report["seconds"].values())
    assert len(report["ranks"]) == 12
    check_development_loss(report, output, place)
    if method == "dense":
        assert kept == dense
        assert report["metrics"] == report["dense_metrics"]
        assert set(report["ranks"].values()) == {None}
        return
    if "param_ratio" in goal:
        assert 0.4 * dense < kept <= 0.5 * dense
    assert ("uncured_metrics" in report) == (not method.startswith("rank-selection"))
    assert ("selections" in report) == method.startswith("rank-selection")
    assert ("joint" in report) == (method == "joint")
    assert ("switch" in report) == method.startswith("cuttlefish")
    if goal.get("epochs") == 0:
        assert report["metrics"] == report["uncured_metrics"]
    if any(rank is not None for rank in report["ranks"].values()):
        model = hf_lowrank.load(output)
        weights = sum(weight.numel() for n in report["ranks"] for weight in matrices(model, n))
        assert kept == weights
        found = {name: layer.rank for name, layer in factorized_layers(model).items()}
        assert found == {n: rank for n, rank in report["ranks"].items() if rank is not None}
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def matrices(model: torch.nn.Module, name: str) -> list[torch.Tensor]:
    return [p for p in model.get_submodule(name).parameters() if p.ndim == 2]


def check_development_loss(report: dict[str, Any], output: Path, place: Path) -> None:
    """The saved model's loss on the development set, one sentence pair at a time."""
    task = load_glue_task(GlueArguments(**settings(place)))
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    with torch.no_grad():
        losses = [model(**task.collator([row])).loss.item() for row in task.validation]
    found = report["development_loss"]
    assert found["compressed"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert found["difference"] == pytest.approx(found["compressed"] - found["dense"], abs=1e-6)
    assert (found["standard_error"] > 0) == (found["difference"] != 0)


def zeros(model: torch.nn.Module) -> float:
    weights = torch.cat([weight.flatten() for weight in target_weights(model).values()])
    return float((weights == 0).float().mean())


def graded(model: torch.nn.Module, split: Any) -> dict[str, float]:
    """Scores that tell a dense, a pruned and a factorized model apart."""
    if factorized_layers(model):
        return {"accuracy": 0.75}
    return {"accuracy": 0.7 if zeros(model) else 0.8}


def test_what_pruning_ruined_is_not_factorized(place: Path, tmp_path: Path):
    args = GlueArguments(
        **settings(place, method="lpaf", param_ratio=0.5, gate=0.9, cache_dir=str(tmp_path))
    )
    task = dataclasses.replace(load_glue_task(args), score=graded)
    for _ in range(2):  # the second finds the pruned model in the cache
        model, report = run_task(task, args)
        assert not factorized_layers(model)
        assert zeros(model) == pytest.approx(0.75, abs=1e-3)
        assert set(report.ranks.values()) == {None}
        assert report.parameters.targeted_share == 1
        assert report.uncured_metrics is None
        assert report.metrics == report.pruned_metrics == {"accuracy": 0.7}
        told = (
            "Not factorized: pruning left 0.7000 of the dense 0.8000 on the held-out examples, "
            "less than 90%. Give it more steps or a higher final_density."
        )
        assert report.refusal == told == report.to_dict()["refusal"]
        assert told in format_scores(report)
        card = model_card(report, "small").text
        assert "Then pruned to a density of 0.25 in 50% of 1 epoch (learning rate 0.0001)." in card
        assert told in card
    args = dataclasses.replace(args, gate=0.87)
    model, report = run_task(task, args)
    assert factorized_layers(model)
    assert report.refusal is None
    assert report.pruned_held_out_metrics == report.pruned_metrics == {"accuracy": 0.7}
    assert report.uncured_metrics == report.metrics == {"accuracy": 0.75}
    assert "pruned_metrics" in format_scores(report)


def test_pruning_starts_from_the_fine_tuned_or_the_pre_trained_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    starts: list[dict[str, torch.Tensor]] = []

    def stop(model: torch.nn.Module, *others: Any, **more: Any) -> None:
        starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        raise InterruptedError

    monkeypatch.setattr(methods, "lpaf_", stop)
    for start in ("fine-tuned", "pre-trained"):
        args = GlueArguments(**settings(place, method="lpaf", param_ratio=0.5, pruning_start=start))
        for _ in range(2):
            with pytest.raises(InterruptedError):
                run_task(load_glue_task(args), args)
    task = load_glue_task(args)
    tuned, fresh = fine_tuning.dense_model(task, args).state_dict(), task.new_model().state_dict()
    for name, tensor in starts[0].items():
        assert torch.equal(tensor, tuned[name])
        assert torch.equal(starts[2][name], starts[3][name])  # the head, too
        if "classifier" not in name:
            assert torch.equal(starts[2][name], fresh[name])


def test_lpaf_and_its_controls_have_equal_steps(place: Path, monkeypatch: pytest.MonkeyPatch):
    """The pruned model of `lpaf-no-mixing` is that of `lpaf`, from the cache."""
    steps: list[int] = []
    train = Trainer.train

    def counted(self: Trainer) -> Any:
        found = train(self)
        steps.append(self.state.global_step)
        assert self.args.distillation_weight == 0.5
        assert self.teacher is not None
        return found

    for method, wanted in (
        ("lpaf", [3, 3]), ("lpaf-no-pruning", [6]), ("lpaf-no-mixing", [3]),
        ("kfac", [6]), ("svd", [6]), ("dense", [6]),
    ):  # fmt: skip
        size = {} if method == "dense" else {"param_ratio": 0.5}
        args = GlueArguments(
            **settings(place, method=method, steps=6, distillation_weight=0.5, gate=0.0, **size)
        )
        task = load_glue_task(args)
        fine_tuning.dense_model(task, args)
        monkeypatch.setattr(Trainer, "train", counted)
        run_task(task, args)
        monkeypatch.setattr(Trainer, "train", train)
        assert steps == wanted, method
        steps.clear()


@pytest.mark.parametrize(("method", "metric"), [
    ("cuttlefish", "plain"), ("cuttlefish-kfac", "kfac"),
])  # fmt: skip
def test_cuttlefish_trains_at_full_rank_then_the_factors(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: str, metric: str
):
    """Nothing settles here, so the switch is due after half of 3 epochs of 3 steps, rounded down.

    The two trainings have the steps of one together.
    """
    monkeypatch.setattr(switch, "is_settled", lambda profiles, epsilon: False)
    states = []
    train = Trainer.train

    def kept(self: Trainer) -> Any:
        found = train(self)
        states.append((self.state.global_step, self.state.max_steps))
        return found

    args = GlueArguments(**settings(place, method=method, param_ratio=0.5, epochs=3))
    task = load_glue_task(args)
    dense = fine_tuning.dense_model(task, args)
    monkeypatch.setattr(Trainer, "train", kept)
    _, report = run_task(task, args)
    assert states == [(4, 9), (5, 5)]
    config = report.config
    assert (config.metric, config.rule) == (metric, "stable-rank")
    labels = "model" if metric == "kfac" else "data"  # the default where no label is read
    assert (config.others["label_source"], config.param_ratio) == (labels, 0.5)
    found = report.switch
    assert (found.step, found.epoch, found.settled) == (4, pytest.approx(4 / 3), False)
    assert [profile.step for profile in found.profiles] == [0, 1, 2, 3, 4]
    ranks = [profile.mean_stable_rank for profile in found.profiles]
    assert ranks[0] == pytest.approx(mean_ranks(target_weights(dense)).stable_rank)
    assert len(set(ranks[1:])) == 4  # the first step of the warm-up has learning rate 0
    assert {"full_rank", "compress", "fine_tune"} <= set(report.seconds)
    card = model_card(report, "small").text
    assert "up to epoch 1.33, when 50% of the steps were done, the stable ranks not settled" in card
    report.switch = dataclasses.replace(found, settled=True)
    assert "up to epoch 1.33, when the stable ranks had settled" in model_card(report, "small").text


def test_joint_sets_share_no_text(place: Path, tmp_path: Path):
    """A development pair that is also trained on is left out of the fitting, not refused."""
    for name in ("MRPC", "model"):
        shutil.copytree(place / name, tmp_path / name)
    rows = (tmp_path / "MRPC" / "train.tsv").read_text().splitlines(keepends=True)
    with (tmp_path / "MRPC" / "dev.tsv").open("a") as file:
        file.writelines(rows[1:12])
    with (tmp_path / "MRPC" / "train.tsv").open("a") as file:
        file.writelines(rows[12:24])
    args = GlueArguments(
        **settings(tmp_path, method="joint", param_ratio=0.5, epochs=0, model=str(place / "model"))
    )
    _, report = run_task(load_glue_task(args), args)
    assert report.parameters.targeted_kept <= 0.5 * report.parameters.targeted_dense


def test_the_dense_model_is_trained_once_for_all_methods(
    run: Any, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    assert run(method="dense", cache_dir=tmp_path / "cache").code == 0
    (folder,) = (tmp_path / "cache").iterdir()
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the dense model was trained again")

    monkeypatch.setattr(fine_tuning, "DistillingTrainer", fail)
    done = run(method="svd", param_ratio=0.9, epochs=0, cache_dir=tmp_path / "cache")
    assert done.code == 0
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {folder.name, "spectra"}
    assert (folder / "model.safetensors").read_bytes() == before


def test_every_method_has_a_name_and_a_function():
    assert tuple(METHODS) == METHOD_NAMES


def test_no_row_of_the_held_out_tenth_is_trained_on(place: Path):
    args = GlueArguments(**settings(place))
    task = load_glue_task(args)
    train, held_out = ({tuple(r["input_ids"]) for r in s} for s in (task.train, task.held_out))
    assert (len(task.train), len(task.held_out), len(task.validation)) == (22, 2, 12)
    assert not train & held_out


@pytest.mark.parametrize(("bf16", "on_gpu", "wanted"), [
    (True, False, "eager"), (False, False, "sdpa"), (True, True, "sdpa"),
])  # fmt: skip
def test_attention_is_plain_under_bf16_on_a_cpu_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, on_gpu: bool, wanted: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    args = GlueArguments(**settings(place) | {"bf16": bf16})
    assert load_glue_task(args).new_model().config._attn_implementation == wanted


def test_the_best_epoch_is_kept(place: Path, tmp_path: Path):
    """A rate that ruins the model leaves the start, which is an epoch like the others."""
    changes = {"method": "svd", "param_ratio": 0.6, "learning_rate": 10.0}
    args = GlueArguments(**settings(place, **changes))
    _, report = run_task(load_glue_task(args), args)
    assert report.metrics == report.uncured_metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rank-selection", "loss_tolerance": 0.0}, "needs a loss_tolerance > 0"),
        ({"method": "pca"}, f"method must be one of {', '.join(METHOD_NAMES)}; got 'pca'."),
        ({"task": "ax"}, "task must be one of cola, "),
        ({"param_ratio": 1.5}, "param_ratio is the kept share of the parameters and must lie in"),
        ({"param_ratio": 0.5, "loss_tolerance": 0.1}, "Give one goal, not 2"),
        ({"method": "rank-selection", "epochs": 0}, "cuts while it trains; epochs must be > 0."),
        ({"method": "cuttlefish", "param_ratio": 0.5, "epochs": 0}, "epochs must be > 0."),
        ({"method": "cuttlefish-kfac"}, "method cuttlefish-kfac cuts to a size; give a param"),
        ({"full_rank_share": 1.0}, "full_rank_share must lie in (0, 1), got 1.0."),
        ({"method": "rank-selection", "distillation_weight": 0.5}, "trains without a teacher; set"),
        ({"distillation_weight": 1.5}, "distillation_weight must lie in [0, 1], got 1.5."),
        ({"gate": -1.0}, "gate must lie in [0, 1], got -1.0."),
        ({"steps": -1}, "steps must be an integer >= 0, got -1."),
        ({"method": "lpaf", "steps": 1}, "lpaf prunes and then trains: set steps to 2 or more."),
        ({"method": "lpaf", "final_density": 0.0}, "final_density must lie in (0, 1], got 0.0."),
        ({"pruning_start": "dense"}, "must be one of fine-tuned, pre-trained; got 'dense'."),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0."),
        (
            {"method": "dense", "param_ratio": 0.5},
            "would do nothing with method 'dense': it is read",
        ),
        (
            {"method": "dense", "form": "factors"},
            "form='factors' would do nothing with method 'den",
        ),
        (
            {"selection_samples": 8},
            "is read with method rank-selection or rank-selection-price. Le",
        ),
        (
            {"selections_per_epoch": 3},
            "with method rank-selection or rank-selection-price or cuttlefi",
        ),
        ({"full_rank_share": 0.3}, "nothing with method 'kfac': it is read with method cuttlefi"),
        ({"final_density": 0.5}, "final_density=0.5 would do nothing with method 'kfac': it is r"),
        ({"method": "lpaf-no-pruning", "pruning_share": 0.3}, "pruning_share=0.3 would do nothing"),
        ({"model": "nobody/no-such-model"}, "nobody/no-such-model: no such folder"),
        ({"data_dir": "nowhere"}, "nowhere: has no train file of mrpc"),
        ({"param_ratio": 0.001}, "raise param_ratio"),
        ({"method": "rank-selection", "param_ratio": 0.001}, "param_ratio"),
        ({"train_samples": 1}, "train"),
    ],
    ids=str,
)
def test_a_mistake_ends_with_one_line(
    run: Any, changes: dict[str, Any], message: str, tmp_path: Path
):
    done = run(output_dir=tmp_path / "output", **changes)
    assert message in done.error
    assert not (tmp_path / "output").exists()
    assert leftovers(tmp_path) == []


def test_an_output_folder_that_holds_something(run: Any, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    assert "exists and is not empty" in run(output_dir=tmp_path).error
    assert (tmp_path / "mine.txt").read_text() == "keep"

"""A mixture of experts made smaller in several ways: perplexities side by side.

The experts alone are cut, all else stays, so that every way leaves the same number of their
weights: narrower, fewer, or both, chosen by price; narrower by the size of weights, and fewer by
how often they are used, the same in every layer. The last two ways are `compress`, by default and
without measured prices, which cuts attention from the same budget.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeForCausalLM

from benchmarks.small_mixture import SIZES, make_tokenizer, read, train_mixture, windows_of
from hf_lowrank.channels.budget import Curve, cheapest
from hf_lowrank.channels.expert_order import ExpertOrder
from hf_lowrank.compression.expert_analysis import order_experts
from hf_lowrank.compression.options import Run
from hf_lowrank.compression.verbs import sweep
from hf_lowrank.config import LowRankConfig, option
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.files import write_text
from hf_lowrank.format.fused_experts import ChannelView
from hf_lowrank.measuring.expert_moments import collect_expert_moments
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.modeling.expert_targets import experts_of, qualified_experts
from hf_lowrank.modeling.surgery import factorized
from hf_lowrank.ranks.plan import ExpertsPlan, RankPlan
from hf_lowrank.report.provenance import write_result

Plans = dict[str, ExpertsPlan]
# How `compress` may price, by the name of its line.
RECIPES = {"compress": True, "compress, no measured prices": False}
METHODS = ("narrower", "fewer", "both", "narrower by magnitude", "fewer by use", *RECIPES)


@dataclass
class ExpertsArguments:
    """Arguments of the comparison on a small mixture of experts."""

    training: str = option("wikitext-2/train.txt", "Text file to train on and to calibrate with.")
    evaluation: str = option("wikitext-2/test.txt", "Text file of the perplexities.")
    param_ratio: list[float] | None = option(None, "Kept shares; default 0.9 0.8 0.6.")
    training_sequences: int = option(2400, "Windows to train on, each once.")
    calibration_sequences: int = option(96, "Windows of the training text behind those.")
    evaluation_sequences: int = option(96, "Windows of the other text.")
    sequence_length: int = option(128, "Tokens in each window.")
    batch_size: int = option(4, "Windows in a step of training.")
    learning_rate: float = option(3e-3, "Largest learning rate.")
    vocab_size: int = option(2048, "Tokens of the vocabulary.")
    num_experts: int = option(32, "Experts of each of the four layers.")
    threads: int = option(1, "Threads of torch.")
    seed: int = option(0, "Seed of the training.")
    model_dir: str = option("", "Folder for the trained model; one that is there is taken.")
    output: str = option("outputs/experts.json", "JSON file of the result.")


def compare_experts(args: ExpertsArguments) -> None:
    """Trains the model and writes a row for each size and way."""
    torch.set_num_threads(args.threads)
    text, length = read(args.training), args.sequence_length
    tokenizer = make_tokenizer(text, args.vocab_size)
    total = args.training_sequences + args.calibration_sequences
    windows = windows_of(tokenizer, text, total, length)
    test = windows_of(tokenizer, read(args.evaluation), args.evaluation_sequences, length)
    calibration = _batches(windows[-args.calibration_sequences :], args.batch_size)
    evaluation = _batches(test, args.batch_size)
    model, training = _model(args, windows[: -args.calibration_sequences])
    dense = measure_loss(model, evaluation).perplexity
    print(f"dense: perplexity {dense:.2f}", flush=True)
    orders, tokens = _orders(model, calibration)
    rows: list[dict[str, Any]] = []
    ratios = args.param_ratio or [0.9, 0.8, 0.6]
    for ratio in ratios:
        for method, (used, plans) in _ways(model, orders, tokens, ratio).items():
            plan = RankPlan({}, {}, experts=plans)
            with factorized(model, {}, plan, used):
                found = measure_loss(model, evaluation).perplexity
            rows.append(_row(method, ratio, plans, found, plan.param_ratio))
    for method, measured in RECIPES.items():
        config = LowRankConfig(channels=True, measured_prices=measured)
        reports = sweep(model, config, ratios, calibration, evaluation, progress=False)
        for ratio, report in zip(ratios, reports, strict=True):
            assert report.evaluation is not None
            share = report.parameters.targeted_share
            found = report.evaluation.perplexity_after
            rows.append(_row(method, ratio, report.experts, found, share))
    result = {"arguments": vars(args), "training": training, "dense": dense, "rows": rows}
    print(format_experts(result))
    write_result(Path(args.output), result)


def _model(args: ExpertsArguments, windows: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    sizes = SIZES | {"vocab_size": args.vocab_size, "num_experts": args.num_experts}
    folder = Path(args.model_dir)
    if args.model_dir and (folder / "config.json").exists():
        trained = json.loads((folder / "training.json").read_text("utf-8"))
        return Qwen3MoeForCausalLM.from_pretrained(folder).eval(), trained
    model, training = train_mixture(
        windows, sizes, batch=args.batch_size, rate=args.learning_rate, seed=args.seed
    )
    if args.model_dir:
        model.save_pretrained(folder)
        write_text(folder / "training.json", json.dumps(training))
    return model, training


def _batches(windows: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(size)
    ]


def _orders(
    model: nn.Module, calibration: list[dict[str, torch.Tensor]]
) -> tuple[dict[str, ExpertOrder], dict[str, torch.Tensor]]:
    """Orders by price, and tokens of each expert, by the layer's name."""
    config = LowRankConfig(channels=True)
    routers = qualified_experts(model, config, calibration[0]).routers
    layers, run = experts_of(model, routers), Run(experts=routers)
    moments = collect_expert_moments(model, layers, calibration, item_losses)
    with torch.no_grad():
        orders = {n: order_experts(n, layers[n], each, config, run) for n, each in moments.items()}
    return orders, {name: each.tokens for name, each in moments.items()}


def _ways(
    model: nn.Module,
    orders: Mapping[str, ExpertOrder],
    tokens: Mapping[str, torch.Tensor],
    ratio: float,
) -> dict[str, tuple[Mapping[str, ExpertOrder], Plans]]:
    """Orders and plans by method."""
    sized = {name: _by_magnitude(model, each) for name, each in orders.items()}
    used = {n: dataclasses.replace(each, drops=tokens[n].double()) for n, each in orders.items()}
    experts, width = next(iter(orders.values())).dense
    step = next(iter(orders.values())).counts[0]
    widths = [step * each for each in _evenly(ratio, width // step, len(orders))]
    counts = _evenly(ratio, experts, len(orders))
    return {
        "narrower": (orders, _cheapest(orders, ratio, lambda size: size[0] == experts)),
        "fewer": (orders, _cheapest(orders, ratio, lambda size: size[1] == width)),
        "both": (orders, _cheapest(orders, ratio, lambda size: True)),
        "narrower by magnitude": (
            sized,
            {n: o.plan(experts, w) for (n, o), w in zip(sized.items(), widths, strict=True)},
        ),
        "fewer by use": (
            used,
            {n: o.plan(c, width) for (n, o), c in zip(used.items(), counts, strict=True)},
        ),
    }


def _evenly(ratio: float, each: int, layers: int) -> list[int]:
    """A share of so many in each layer, as even as whole numbers within the share allow."""
    total = int(ratio * each * layers + 1e-6)
    return [total // layers + (place < total % layers) for place in range(layers)]


def _cheapest(
    orders: Mapping[str, ExpertOrder], ratio: float, allowed: Callable[[tuple[int, int]], bool]
) -> Plans:
    """The sizes of the smallest predicted rise among those that are allowed."""
    sizes, parts = {}, []
    for name, order in orders.items():
        places = [place for place, size in enumerate(order.sizes) if allowed(size)]
        sizes[name] = [order.sizes[place] for place in places]
        costs = [order.plan(*size).kept_parameters for size in sizes[name]]
        parts.append([[Curve(torch.tensor(costs).double(), order.rises[places])]])
    dense = sum(order.plan(*order.dense).dense_parameters for order in orders.values())
    choice = cheapest(parts, int(ratio * dense + 1e-6))
    return {
        name: order.plan(*sizes[name][places[0]])
        for (name, order), (_, places) in zip(orders.items(), choice, strict=True)
    }


def _by_magnitude(model: nn.Module, order: ExpertOrder) -> ExpertOrder:
    """Channels by the size of their weights, and no refit."""
    view = ChannelView.of(model.get_submodule(order.name))
    size = view.into.double().square().sum(dim=(1, 3)) + view.out.double().square().sum(dim=1)
    unit = torch.eye(order.dense[1]).expand(order.moment.shape)
    return dataclasses.replace(order, order=size.argsort(dim=1, descending=True), moment=unit)


def _row(
    method: str, ratio: float, plans: Mapping[str, ExpertsPlan], perplexity: float, share: float
) -> dict[str, Any]:
    print(f"{ratio:g} {method}: perplexity {perplexity:.2f}", flush=True)
    return {
        "method": method,
        "param_ratio": ratio,
        "share": share,
        "perplexity": perplexity,
        "experts": [each.experts for each in plans.values()],
        "widths": [each.width for each in plans.values()],
    }


def format_experts(result: Mapping[str, Any]) -> str:
    """A table: perplexities, a line for each way, a column for each size."""
    ratios = list(dict.fromkeys(row["param_ratio"] for row in result["rows"]))
    found = {(row["method"], row["param_ratio"]): row["perplexity"] for row in result["rows"]}
    lines = ["| experts are made | " + " | ".join(f"{each:g}" for each in ratios) + " |"]
    lines.append("|---" * (len(ratios) + 1) + "|")
    for method in METHODS:
        cells = " | ".join(f"{found[method, ratio]:.2f}" for ratio in ratios)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines)

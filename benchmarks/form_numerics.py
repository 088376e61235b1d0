"""How far layers in the compact form are from their own product, in several data types."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.perturbation_range import reweighted
from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.options import Run, Texts
from hf_lowrank.config import LowRankConfig, option
from hf_lowrank.decomposition.metrics import QuadraticForm
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.format.forms.compact import CompactLinear
from hf_lowrank.inputs.sources import load_causal_lm
from hf_lowrank.inputs.text import token_batches
from hf_lowrank.modeling.surgery import factorized, lowrank_from_factors
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.provenance import write_result

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class FormNumericsArguments:
    """Arguments of the measurement of rounding."""

    model: str = option("demo", "Dense model, as in compress_llm.py.")
    param_ratio: float = option(0.8, "Size, of ranks alone.")
    calibration: str = option("demo", "Calibration text.")
    evaluation: str = option("demo", "Evaluation text.")
    calibration_sequences: int = option(48, "Token windows for calibration.")
    evaluation_sequences: int = option(8, "Token windows for evaluation.")
    sequence_length: int = option(256, "Tokens in each window.")
    dtypes: list[str] | None = option(None, "Data types; default " + " ".join(DTYPES) + ".")
    layers: int = option(200, "Random layers.")
    seed: int = option(0, "Seed of the random layers.")
    output: str = option("outputs/form_numerics.json", "JSON file of the result.")


def measure_numerics(args: FormNumericsArguments) -> None:
    """Writes errors of random layers, and logits and perplexities of a model."""
    dtypes = args.dtypes or list(DTYPES)
    random = {dtype: random_layers(args.layers, args.seed, dtype) for dtype in dtypes}
    for dtype, row in random.items():
        print(f"{args.layers} random layers, {dtype}: {row}")
    model = _measure_model(args, dtypes)
    print(model)
    write_result(Path(args.output), {"arguments": vars(args), "random": random, "model": model})


def random_layers(count: int, seed: int, dtype: str) -> dict[str, float]:
    """Largest relative errors of the output over random shapes, ranks and spectra.

    Both forms are compared with the product in fp64; the error is relative to the root mean square
    of the outputs.
    """
    generator, kind = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    worst = {"compact": 0.0, "factors": 0.0, "coefficient": 0.0, "condition": 0.0}
    for _ in range(count):
        rows, columns = torch.randint(2, 97, (2,), generator=generator).tolist()
        rank = int(torch.randint(1, min(rows, columns), (1,), generator=generator))
        weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
        decay = torch.logspace(0, -4 * float(torch.rand(1, generator=generator)), len(sigma))
        weight = (left * sigma * decay.double()) @ right
        factors = decompose(weight, QuadraticForm(), dtype=torch.float64)[1]
        inputs = torch.randn(16, columns, generator=generator).to(kind)
        wanted = inputs.double() @ factors.product(rank).T
        source = nn.Linear(columns, rows, bias=False, dtype=kind)
        for form in ("compact", "factors"):
            layer = lowrank_from_factors(source, factors, rank, form)
            with torch.no_grad():
                error = (layer(inputs).double() - wanted).abs().max()
            worst[form] = max(worst[form], float(error / wanted.square().mean().sqrt()))
            if isinstance(layer, CompactLinear):
                for name, value in pivot_figures(layer).items():
                    worst[name] = max(worst[name], value)
    return worst


def pivot_figures(layer: CompactLinear) -> dict[str, float]:
    """Largest coefficient, and condition of the pivots as they are stored."""
    pivots, coefficients = layer.lowrank_B.weight, layer.lowrank_A.weight
    if not layer.by_inputs:
        pivots, coefficients = coefficients, pivots
    values = torch.linalg.svdvals(pivots.detach().double())
    condition = float(values[0] / values[-1].clamp_min(torch.finfo(torch.float64).tiny))
    largest = float(coefficients.detach().abs().max()) if coefficients.numel() else 0.0
    return {"coefficient": largest, "condition": condition}


def _measure_model(args: FormNumericsArguments, dtypes: list[str]) -> dict[str, Any]:
    model, tokenizer = load_causal_lm(args.model, "float32")
    texts: Mapping[str, Any] = {
        role: token_batches(
            getattr(args, role),
            tokenizer,
            sequences=getattr(args, f"{role}_sequences"),
            sequence_length=args.sequence_length,
            role=role,
        )
        for role in ("calibration", "evaluation")
    }
    config = LowRankConfig(param_ratio=args.param_ratio, channels=False, measured_prices=False)
    run = Run(Texts(texts["calibration"]))
    analysis = analyze(model, find_targets(model, config), config, run)
    plan = decide(model, analysis, run).plan
    chosen = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    products = {name: analysis.factors[name].product(rank) for name, rank in chosen.items()}
    found: dict[str, Any] = {}
    for dtype in dtypes:
        typed = copy.deepcopy(model).to(getattr(torch, dtype))
        with reweighted(typed, products):
            product = _logits_and_loss(typed, texts["evaluation"])
        with factorized(typed, analysis.factors, plan, form=plan.form):
            compact = _logits_and_loss(typed, texts["evaluation"])
            layers = [m for m in typed.modules() if isinstance(m, CompactLinear)]
            figures = [pivot_figures(layer) for layer in layers]
        found[dtype] = {
            "perplexity": compact[1],
            "perplexity_of_product": product[1],
            "largest_logit_difference": float((compact[0] - product[0]).abs().max()),
            "logit_spread": float(product[0].std()),
            "coefficient": max(each["coefficient"] for each in figures),
            "condition": max(each["condition"] for each in figures),
        }
    return found


@torch.no_grad()
def _logits_and_loss(model: nn.Module, batches: list[Any]) -> tuple[torch.Tensor, float]:
    """fp32 logits of the first batch, and the perplexity of all."""
    logits = model(input_ids=batches[0]["input_ids"]).logits.float()
    return logits, measure_loss(model, batches).perplexity

"""Which systems are compared: most are a metric and a rank rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_lowrank.errors import ConfigError

RANKED, JOINT, STRUCTURED = "ranked", "joint", "structured"


@dataclass(frozen=True)
class System:
    """A metric with a rank rule, the joint system, or one that changes widths or shares factors.

    Attributes:
        name: Key of its rows.
        metric: A name in `METRICS`; of a structured system, what its factors are made in.
        rule: A name in `RULES` or `SEARCHES`; else what takes the place of a rank rule.
        source: Where it comes from; what was simplified stands with the metric and the rule.
        kind: "ranked" for a metric with a rule, "joint", or "structured" for those of
            structured/methods.py.
    """

    name: str
    metric: str
    rule: str
    source: str
    kind: str = RANKED


# Rank rules whose papers decompose the plain weights; each is also run on the kfac metric.
_RANK_RULES = (
    ("ijcai2025", "relative", "IJCAI 2025, without training"),
    ("per-layer-energy", "energy-share", "per-layer heuristic (class of Ito 2021, Cao 2024)"),
    ("cuttlefish", "stable-rank", "Wang 2023, without training"),
    ("kim2020", "bayes-types", "Kim 2020"),
    ("cheng2020", "cross-entropy", "Cheng 2020"),
    ("pars", "bayes-proxy", "Sobolev 2022"),
    ("haloc", "latency", "Xiao 2023"),
)
SYSTEMS = (
    System("svd", "plain", "uniform", "Eckart-Young"),
    *(System(name, "plain", rule, source) for name, rule, source in _RANK_RULES),
    System("fwsvd", "fisher-rows", "uniform", "Hsu 2022"),
    System("asvd", "activation-scale", "sensitivity", "Yuan 2023"),
    System("svd-llm", "whitened", "uniform", "Wang 2025; LORD (Kaushal 2023) is the same"),
    System("bolaco", "pooled", "bayes-groups", "Ji 2024"),
    System("kfac-uniform", "kfac", "uniform", "Thoma 2026, without the search"),
    *(System(f"{name}+kfac", "kfac", rule, source) for name, rule, source in _RANK_RULES),
    System("asvd+kfac", "kfac", "sensitivity", "Yuan 2023"),
    System("bolaco+kfac", "kfac", "bayes-groups", "Ji 2024"),
    System("kfac+price", "kfac", "price", "this library"),
    System("joint", "kfac", "joint", "this library", JOINT),
    System("lorap", "norm-scaled", "pruned channels", "Li 2024, without fine-tuning", STRUCTURED),
    System(
        "sp3", "whitened", "principal channels", "Hu 2024, closed form, widths only", STRUCTURED
    ),
    System("model-folding", "plain", "merged channels", "Wang 2025 (folding)", STRUCTURED),
    System("model-folding+repair", "plain", "merged, repaired", "Wang 2025 (folding)", STRUCTURED),
    System("basis-sharing", "whitened", "shared basis", "Wang 2025 (Basis Sharing)", STRUCTURED),
)


def select_systems(names: Sequence[str]) -> list[System]:
    """Systems by name; all of them if no name is given.

    Raises:
        ConfigError: There is no such system.
    """
    known = {system.name: system for system in SYSTEMS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"No system {unknown[0]!r}; there are {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names or known)]

"""Which systems are compared: a metric and a rank rule each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_lowrank.errors import ConfigError

JOINT = "joint"


@dataclass(frozen=True)
class System:
    """A metric with a rank rule, or the joint system.

    Attributes:
        name: Key of its rows.
        metric: A name in `METRICS`.
        rule: A name in `RULES` or `SEARCHES`, or "joint".
        source: Where it comes from; what was simplified stands with the metric and the rule.
    """

    name: str
    metric: str
    rule: str
    source: str


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
    System("joint", "kfac", JOINT, "this library"),
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

"""Which systems are compared, most of them a metric and a rank rule, and how each is classed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.plan import COMPACT

RANKED, JOINT, STRUCTURED = "ranked", "joint", "structured"
OWN = "this library"

Scope = Literal["layer-wise", "by group", "one share"]
Basis = Literal["theory", "heuristic", "search", "theory, then search"]
Stage = Literal["after training", "during, run after"]


@dataclass(frozen=True)
class System:
    """A metric with a rank rule, the joint system, or one that changes widths or shares factors.

    `scope`, `basis` and `stage` answer the three questions by which the IJCAI 2025 paper (Guo and
    Yu: "Integrating Independent Layer-Wise Rank Selection with Low-Rank SVD Training") classes
    the systems that it compares: a rank for each layer or one rule for all, theory or heuristic,
    during or after training. Its table was not at hand; the answers here are our own. Scope and
    basis class the rank rule as it is run here, with the simplifications of docs/methods.md: a
    search that is left out does not count. That all systems end in one budget, which takes a
    factor common to all layers, does not count either. "theory" says where a rule comes from, not
    that it keeps its promise: the bound behind `relative` holds for plain feed-forward nets, and
    prices are second-order predictions.

    Attributes:
        name: Key of its rows.
        metric: A name in `METRICS`; of a structured system, what its factors are made in.
        rule: A name in `RULES` or `SEARCHES`; else what takes the place of a rank rule.
        source: Where it comes from; what was simplified stands with the metric and the rule.
        scope: "layer-wise": each layer has a rank of its own; "by group": layers of a type, or of
            a type and a part of the depth, share one choice; "one share": every layer keeps the
            same share. Of a system with widths, the answer for the layers that it factorizes.
        basis: "theory": from a bound or an expansion of the loss; "search": losses of the cut
            model, or a proxy of them, are tried out; "heuristic": neither, equal shares included;
            "theory, then search": theory proposes, losses measured decide.
        stage: "after training", or "during, run after" where the source cuts, or learns what to
            cut, while the model trains, and the row here cuts a trained model. Training that
            only repairs a cut, or judges one, does not count.
        kind: "ranked" for a metric with a rule, "joint", or "structured" for those of
            structured/methods.py.
        channels: Of a ranked system, whether feed-forwards may lose channels, too.
        measured: Of a ranked system, whether its cuts are priced on held-out text.
        form: Stored form of its low-rank layers, which is what its sizes count: two factors, as
            papers store them, or "compact" in the rows that show what the form alone brings.
    """

    name: str
    metric: str
    rule: str
    source: str
    scope: Scope
    basis: Basis
    stage: Stage
    kind: str = RANKED
    channels: bool = False
    measured: bool = False
    form: str = "factors"

    @property
    def compact(self) -> System:
        """The same with compact factors."""
        return replace(self, name=f"{self.name}+compact", form=COMPACT)


@dataclass(frozen=True)
class _Ranks:
    """A rank rule with its source and class."""

    rule: str
    source: str
    scope: Scope
    basis: Basis
    stage: Stage = "after training"

    def on(self, name: str, metric: str) -> System:
        """The rule as a system, on a metric."""
        return System(name, metric, self.rule, self.source, self.scope, self.basis, self.stage)


def _equal(name: str, metric: str, source: str) -> System:
    return _Ranks("uniform", source, "one share", "heuristic").on(name, metric)


def _structured(
    name: str,
    metric: str,
    rule: str,
    source: str,
    scope: Scope = "one share",
    stage: Stage = "after training",
) -> System:
    return System(name, metric, rule, source, scope, "heuristic", stage, STRUCTURED)


_LATE: Stage = "during, run after"
_ENERGY = "per-layer heuristic (class of Ito 2021, Cao 2024)"
# Rank rules whose papers decompose the plain weights; each is also run on the kfac metric.
_RULES = {
    "ijcai2025": _Ranks("relative", "IJCAI 2025, without training", "layer-wise", "theory", _LATE),
    "per-layer-energy": _Ranks("energy-share", _ENERGY, "layer-wise", "heuristic"),
    "cuttlefish": _Ranks(
        "stable-rank", "Wang 2023, without training", "layer-wise", "heuristic", _LATE
    ),
    "kim2020": _Ranks("bayes-types", "Kim 2020", "by group", "search"),
    "cheng2020": _Ranks("cross-entropy", "Cheng 2020", "by group", "search"),
    "pars": _Ranks("bayes-proxy", "Sobolev 2022", "by group", "search"),
    "haloc": _Ranks("latency", "Xiao 2023", "layer-wise", "heuristic", _LATE),
}
_SENSITIVITY = _Ranks("sensitivity", "Yuan 2023", "layer-wise", "search")
_GROUPS = _Ranks("bayes-groups", "Ji 2024", "by group", "search")
_PRICE = _Ranks("price", OWN, "layer-wise", "theory")
_FOLDING = "Wang 2025 (folding)"
AS_PAPERS_STORE = (
    _equal("svd", "plain", "Eckart-Young"),
    *(ranks.on(name, "plain") for name, ranks in _RULES.items()),
    _equal("fwsvd", "fisher-rows", "Hsu 2022"),
    _SENSITIVITY.on("asvd", "activation-scale"),
    _equal("svd-llm", "whitened", "Wang 2025; LORD (Kaushal 2023) is the same"),
    _GROUPS.on("bolaco", "pooled"),
    _equal("kfac-uniform", "kfac", "Thoma 2026, without the search"),
    *(ranks.on(f"{name}+kfac", "kfac") for name, ranks in _RULES.items()),
    _SENSITIVITY.on("asvd+kfac", "kfac"),
    _GROUPS.on("bolaco+kfac", "kfac"),
    _PRICE.on("kfac+price", "kfac"),
    System(
        "joint", "kfac", "joint", OWN, "layer-wise", "theory, then search", "after training", JOINT
    ),
    *(
        System(
            name,
            "kfac",
            "price",
            OWN,
            "layer-wise",
            "theory, then search" if "measured" in name else "theory",
            "after training",
            channels="channels" in name,
            measured="measured" in name,
        )
        for name in ("kfac+price+measured", "price+channels", "price+channels+measured")
    ),
    _structured(
        "lorap", "norm-scaled", "pruned channels", "Li 2024, without fine-tuning", "layer-wise"
    ),
    _structured(
        "sp3",
        "whitened",
        "principal channels",
        "Hu 2024, closed form, widths only",
        stage=_LATE,
    ),
    _structured("model-folding", "plain", "merged channels", _FOLDING),
    _structured("model-folding+repair", "plain", "merged, repaired", _FOLDING),
    _structured("basis-sharing", "whitened", "shared basis", "Wang 2025 (Basis Sharing)"),
)
SYSTEMS = AS_PAPERS_STORE + tuple(
    system.compact for system in AS_PAPERS_STORE if system.kind != STRUCTURED
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

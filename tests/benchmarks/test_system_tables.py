"""The tables of systems: the dense model on top, classes and measured columns below."""

import inspect
from typing import get_args

from benchmarks import catalogue
from benchmarks.catalogue import OWN, RANKED, SYSTEMS
from benchmarks.system_tables import format_positions, format_report, format_shares, format_systems
from hf_lowrank.ranks.rules import RULES
from tests.benchmarks.made_up_rows import failed_row, made_up_row

ROWS = [
    made_up_row("joint", 0.4, -0.0012),
    made_up_row("joint", 0.8, 0.25),
    made_up_row("svd", 0.8, None),
    failed_row("haloc", 0.8),
]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]


def test_positions_have_classes_and_measured_columns():
    heads, _, svd, haloc, joint = cells(format_positions(ROWS))
    assert heads[:5] == ["system", "source", "ranks", "basis", "stage"]
    assert heads[5:] == ["in_domain 0.8", "in_domain 0.4", "out_of_domain 0.8", "out_of_domain 0.4"]
    assert joint[:5] == ["joint", OWN, "layer-wise", "theory, then search", "after training"]
    assert joint[5:] == ["0.250 ± 0.004", "-0.001 ± 0.004", "0.500 ± 0.004", "-0.002 ± 0.004"]
    assert svd[:5] == ["svd", "Eckart-Young", "one share", "heuristic", "after training"]
    assert svd[5:] == ["inf", "", "inf", ""]
    assert haloc[4:] == ["during, run after", "failed", "", "failed", ""]


def test_classes_are_known_and_agree_with_the_rules_that_are_run():
    for system in SYSTEMS:
        assert system.scope in get_args(catalogue.Scope)
        assert system.basis in get_args(catalogue.Basis)
        assert system.stage in get_args(catalogue.Stage)
        if system.kind == RANKED:
            assert (system.scope == "one share") == (system.rule == "uniform")
            assert (system.scope == "by group") == (
                system.rule.startswith("bayes") or system.rule == "cross-entropy"
            )
            if system.rule in RULES and not system.measured:  # scores, no trials
                assert "search" not in system.basis
    by_rule = {}
    for system in SYSTEMS:
        found = (system.scope, system.basis, system.stage)
        if system.kind == RANKED:
            rule = system.rule, system.measured
            assert by_rule.setdefault(rule, found) == found  # the metric changes no class
    words = inspect.getdoc(catalogue.System)
    for answers in (catalogue.Scope, catalogue.Basis, catalogue.Stage):
        assert all(f'"{answer}"' in words for answer in get_args(answers))


def test_the_dense_model_comes_first():
    table = cells(format_systems(ROWS))
    assert table[2] == ["1", "dense", "", "", "1,000", "20.09", "54.6", *[""] * 6]
    assert [line[1] for line in table[3:]] == ["joint", "svd", "haloc", "joint"]
    assert len({len(line) for line in table}) == 1
    assert [line[1] for line in cells(format_systems(ROWS[3:]))] == ["system", "---", "haloc"]


def test_the_report_has_both_tables():
    report = format_report(ROWS)
    assert report.startswith(format_systems(ROWS) + "\n\n")
    assert report.endswith("\n\n" + format_positions(ROWS))


def test_shares_are_those_of_kfac_and_price_at_the_same_size():
    base = made_up_row("kfac+price", 0.8, 0.5)
    rows = [*ROWS, base | {"total_seconds": 4.0}, made_up_row("kfac+price", 0.6, 1.0)]
    heads, _, *lines = cells(format_shares(rows))
    assert heads == ["size", "system", "in_domain", "out_of_domain", "seconds"]
    assert lines == [["0.8", "joint", "0.50", "0.50", "0.5"], ["0.8", "svd", "", "", "0.5"]]
    assert format_shares(rows) in format_report(rows)
    assert format_shares(ROWS) == ""

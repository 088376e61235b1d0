"""The speed in tables, pages and cards; reports with and without it side by side."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from hf_lowrank import Report
from hf_lowrank.report.card.card import model_card
from hf_lowrank.report.page.page import comparison_page, report_page
from hf_lowrank.report.sections import Speed, SpeedConditions, Timing
from hf_lowrank.report.text.speed_table import speed_columns, speed_conditions, speed_notes
from hf_lowrank.report.text.table import differences, format_comparison, format_report, format_sweep
from tests.report.test_page import Page, full_report
from tests.report.test_report import lines_of, report

CONDITIONS = SpeedConditions(
    batch_size=3,
    prompt_tokens=100,
    new_tokens=20,
    repeats=2,
    seed=0,
    max_seconds=None,
    rounds=2,
    device="cpu",
    hardware="Abacus 9",
    threads=7,
    dtype="bfloat16",
)


def speed(**settings: Any) -> Speed:
    """Two rounds: prefill 2 and 1.5 times as fast, decode slower."""
    return Speed(
        Timing((2.0, 3.0), (4.0, 4.0), 2.5, 4.0, 51.25, 8.0),
        Timing((1.0, 2.0), (5.0, 4.5), 1.5, 4.75, 82.0, 6.75),
        dataclasses.replace(CONDITIONS, **settings),
    )


FACTS = (
    "on the machine of this run alone: Abacus 9, device cpu, 7 CPU threads, bfloat16",
    "batch size 3, 100 tokens read at once (prefill), then 20 one by one (decode)",
    "medians of 2 rounds",
    "prefill 1.50x to 2.00x, decode 0.80x to 0.89x",
)


def test_a_report_with_speed_comes_back_from_its_file(tmp_path: Path):
    original = report(speed=speed())
    original.save(tmp_path / "report.json")
    assert Report.load(tmp_path) == original
    old = json.loads((tmp_path / "report.json").read_text("utf-8"))
    del old["speed"]
    (tmp_path / "report.json").write_text(json.dumps(old), encoding="utf-8")
    assert Report.load(tmp_path) == report()
    assert report().speed is None


def test_the_terminal_shows_tokens_per_second_and_the_conditions():
    text = format_report(report(speed=speed()))
    assert ["prefill", "(tokens/s)", "51.2", "82.0", "1.60x"] in lines_of(text)
    assert ["decode", "(tokens/s)", "8.0", "6.8", "0.84x"] in lines_of(text)
    assert all(fact in text for fact in FACTS)


def test_one_round_has_no_range():
    text = "\n".join(speed_notes(report(speed=speed(rounds=1))))
    assert "one round only, so its noise is not known" in text
    assert "medians" not in text
    assert "round to round" not in text


def test_page_and_card_show_tokens_per_second_and_the_conditions():
    timed = full_report(speed=speed(), architecture="LlamaForCausalLM")
    words = Page(report_page(timed)).words
    at = words.index("prefill (tokens/s)")
    assert words[at : at + 4] == ["prefill (tokens/s)", "51.2", "82.0", "1.60x"]
    card = model_card(timed, "ada/small").text
    assert "| decode (tokens/s) | 8.0 | 6.8 | 0.84x |" in card
    for text in (card, "\n".join(words)):
        assert all(fact in text for fact in FACTS)
    unread = model_card(report(speed=speed(), evaluation=None), "ada/small").text
    assert FACTS[0] in unread


def test_without_speed_nothing_is_said_about_it():
    bare = full_report()
    texts = [
        format_report(bare),
        report_page(bare),
        format_sweep([bare]),
        comparison_page({"a": bare}),
    ]
    card = model_card(bare, "ada/small").text
    assert not any("speed" in text or "tokens/s" in text for text in [*texts, card])


def test_sizes_have_a_column_for_each_speed_up():
    pair = [report(speed=speed()), report()]
    assert speed_columns(pair) == [
        ["prefill speed-up", "decode speed-up"],
        ["1.60x", "0.84x"],
        ["-", "-"],
    ]
    assert [line[-2:] for line in lines_of(format_sweep(pair))[1:]] == [
        ["1.60x", "0.84x"],
        ["-"] * 2,
    ]


def test_runs_side_by_side_have_a_table_of_the_timed_ones():
    named = {"a": report(speed=speed()), "b": report()}
    row = ["a", "51.2", "82.0", "1.60x", "8.0", "6.8", "0.84x"]
    assert lines_of(format_comparison(named))[-1] == row
    words = Page(comparison_page(named)).words
    at = words.index("1.60x")
    assert words[at - 3 : at + 4] == row
    assert f"Timed on {speed_conditions(named['a'])}." in words


def test_speeds_of_other_machines_are_not_comparable():
    same = {"a": report(speed=speed()), "b": report(speed=speed(rounds=5)), "c": report()}
    assert differences(same) == []
    (found,) = differences(same | {"d": report(speed=speed(hardware="Slide rule"))})
    assert found.startswith("different conditions of the speed (Abacus 9, device cpu")
    assert "Slide rule" in found

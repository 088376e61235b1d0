"""The second evaluation, on foreign text: in the table, the card, the page and the JSON."""

from html import unescape
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank.report.card.card import model_card
from hf_lowrank.report.page.page import report_page
from hf_lowrank.report.public import public_report
from hf_lowrank.report.schema import Report, report_text
from hf_lowrank.report.sections import Data, Evaluation
from hf_lowrank.report.text.table import format_report, format_sweep
from tests.report.test_report import lines_of, report

FOREIGN = Evaluation(20.5, 44.75, 3.0204, 3.8011, 0.7807, 0.0456, 2222)
TEXTS = Data(calibration="demo + demo-graphs:0.25", evaluation="demo", foreign="a/b:c:test")


def both(**changes: Any) -> Report:
    return report(foreign_evaluation=FOREIGN, data=TEXTS, architecture="GPT2LMHeadModel", **changes)


def test_the_table_says_which_is_which():
    text = format_report(both())
    assert ["perplexity", "10.50", "12.25"] in lines_of(text)
    assert ["perplexity,", "foreign", "text", "20.50", "44.75"] in lines_of(text)
    assert (
        "loss difference +0.7807 +- 0.0456 nats per token, over 2,222 tokens of foreign text "
        "(a/b:c:test), unlike the calibration's"
    ) in text
    assert "foreign" not in format_report(report())


def test_a_sweep_has_a_column_for_it():
    head, first, second = format_sweep([both(), report()]).split("\n")
    assert head.endswith("perplexity, foreign text")
    assert first.endswith("44.75")
    assert second.endswith("-")
    assert "foreign" not in format_sweep([report()])


def test_the_card_has_both():
    text = model_card(both(), "ada/small").text
    assert "| perplexity, foreign text | 20.50 | 44.75 |" in text
    assert "Foreign text, unlike the calibration's: 2,222 scored tokens of a/b:c:test" in text
    assert "differs by +0.7807 ± 0.0456 nats per token" in text
    assert "Measured on the texts above alone" in text
    plain = model_card(report(data=TEXTS), "ada/small").text
    assert "oreign" not in plain
    assert "Measured on the text above alone" in plain


def test_the_card_names_every_dataset_of_a_mixture():
    mixed = "Salesforce/wikitext:wikitext-2-raw-v1 + allenai/c4:en:0.25 + /home/ada/mail.txt:0.1"
    card = model_card(report(data=Data(calibration=mixed, calibration_tokens=9)), "ada/small")
    assert card.data.to_dict()["datasets"] == ["Salesforce/wikitext", "allenai/c4"]
    assert "9 tokens of a mixture (Salesforce/wikitext:wikitext-2-raw-v1 + " in card.text
    assert "/home/ada" not in card.text
    assert "mail.txt:0.1" in card.text


def test_the_page_has_both():
    pytest.importorskip("matplotlib")
    page = unescape(report_page(both()))
    assert "perplexity, foreign text" in page
    assert "44.75" in page
    assert "tokens of foreign text, unlike the calibration's (a/b:c:test)." in page


def test_the_json_keeps_both(tmp_path: Path):
    both().save(tmp_path / "report.json")
    assert Report.load(tmp_path).foreign_evaluation == FOREIGN
    assert Report.load(tmp_path).evaluation == report().evaluation


def test_a_published_report_has_no_folders_of_a_mixture():
    mixed = Data(calibration="demo + /home/ada/mail.txt:0.25", evaluation="x/y.txt + b.txt")
    found = public_report(report_text(report(data=mixed).to_dict()))
    assert '"demo + mail.txt:0.25"' in found
    assert '"y.txt + b.txt"' in found

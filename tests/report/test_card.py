"""The model card: metadata the Hub can read, and no figure that is not in the report."""

import re
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_lowrank.report.card.card import TAGS, model_card
from hf_lowrank.report.quantization import Quantization
from hf_lowrank.report.sections import Data, Sizes
from tests.report.test_report import report

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
HUB = {"base_model": "acme/dense", "model": "acme/dense", "architecture": "LlamaForCausalLM"}
TEXTS = Data(
    calibration="Salesforce/wikitext:wikitext-2-raw-v1",
    evaluation="Salesforce/wikitext:wikitext-2-raw-v1:test",
    calibration_tokens=16384,
)


def metadata(**changes: Any) -> dict[str, Any]:
    """The card's metadata after a round through its text."""
    return ModelCard(str(model_card(report(**changes), "ada/small"))).data.to_dict()


def test_metadata_of_a_model_from_the_hub():
    found = metadata(**HUB, data=TEXTS)
    assert found["base_model"] == "acme/dense"
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == TAGS
    assert found["datasets"] == ["Salesforce/wikitext"]
    assert found["metrics"] == ["perplexity", "loss"]
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {
        "name": "Salesforce/wikitext",
        "type": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
    }
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {"perplexity": 12.25, "loss": 2.5055}


def test_metadata_that_is_not_known_is_left_out():
    found = metadata(evaluation=None)
    assert set(found) == {"library_name", "tags"}


@pytest.mark.parametrize(
    ("architecture", "tag", "loader", "has_perplexity"),
    [
        ("GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM", True),
        ("T5ForConditionalGeneration", "text2text-generation", "AutoModelForSeq2SeqLM", True),
        (
            "BertForSequenceClassification",
            "text-classification",
            "AutoModelForSequenceClassification",
            False,
        ),
        ("Mine", None, "AutoModel", False),
    ],
)
def test_the_task_follows_from_the_class(
    architecture: str, tag: str | None, loader: str, has_perplexity: bool
):
    card = model_card(report(architecture=architecture), "ada/small")
    assert card.data.to_dict().get("pipeline_tag") == tag
    assert f"import {loader}, AutoTokenizer" in card.text
    assert ("perplexity" in card.text) == has_perplexity


def test_the_card_shows_both_ways_to_load_and_compiles():
    text = model_card(report(**HUB), "ada/small").text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")
        assert '.from_pretrained("ada/small"' in block
    assert "import hf_lowrank" in blocks[0]
    assert "trust_remote_code=True" in blocks[1]
    assert "hf_lowrank" not in blocks[1]
    assert "[acme/dense](https://huggingface.co/acme/dense)" in text


def test_every_figure_of_the_report_is_in_the_card():
    text = model_card(report(**HUB, data=TEXTS), "ada/small").text
    for figure in ("1,000,000", "750,000", "75.0%", "4.0", "3.1", "10.50", "12.25"):
        assert f"| {figure} |" in text
    assert "differs by +0.1541 ± 0.0123 nats per token" in text
    assert "4,321 scored tokens" in text
    assert "16,384 tokens of Salesforce/wikitext" in text
    assert "| up | 2 | 0 | 3 | 5.5 | 8 |" in text


def test_quantized_weights_and_what_loads_them_are_said():
    quantization = Quantization("int4", 12, {"32": 12}, Sizes(4_000_000, 1_200_000))
    ranks = {"model.layers.0.mlp.up_proj": None}
    card = str(model_card(report(quantization=quantization, ranks=ranks), "ada/small"))
    assert "Weights of targeted layers: 12 int4, 4.0 MB -> 1.2 MB" in card
    assert "Loading needs torchao." in card
    assert "trust_remote_code" in card  # though no layer has a rank


def test_no_evaluation_is_said_and_nothing_is_claimed():
    text = model_card(report(**HUB, evaluation=None), "ada/small").text
    assert "Quality: not measured." in text
    assert "perplexity" not in text
    assert "The quality of this model was not measured." in text


def test_folders_of_the_machine_stay_on_the_machine():
    card = model_card(
        report(
            model="/home/ada/models/tiny",
            data=Data(calibration="../texts/a.txt", evaluation="/home/ada/b.raw"),
        ),
        "small",
    )
    assert "/home" not in str(card)
    assert "../" not in str(card)
    assert "`tiny`" in card.text
    assert "b.raw" in card.text


def test_what_a_reader_must_know_is_among_the_limits():
    text = model_card(report(failures={"a.1.up": "no positive eigenvalue"}), "small").text
    limits = text[text.index("## Limits") :]
    assert "- Kept dense: a.1.up: no positive eigenvalue." in limits


def test_the_template_is_part_of_the_package_and_filled_completely():
    template = (
        resources.files("hf_lowrank.report.card").joinpath("card_template.md").read_text("utf-8")
    )
    assert "{{ card_data }}" in template
    for page in (True, False):
        text = str(model_card(report(**HUB), "ada/small", page))
        assert "{{" not in text
        assert "{%" not in text
        assert ("report.html" in text) == page


# model_cards/


def test_the_kept_cards_are_what_their_reports_give_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = {path.name: path.read_text("utf-8") for path in CARDS.glob("*-*.md")}
    assert len(kept) >= 2
    shutil.copytree(CARDS, tmp_path / "model_cards")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"```python\n(.*?)```", (CARDS / "README.md").read_text("utf-8"), re.DOTALL
    )
    exec(compile(code, "model_cards/README.md", "exec"), {})
    made = {path.name: path.read_text("utf-8") for path in Path("model_cards").glob("*-*.md")}
    assert made == kept

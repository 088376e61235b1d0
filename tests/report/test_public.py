"""A report for readers elsewhere names no folder of the machine that it was made on."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank.report.card.card import model_card
from hf_lowrank.report.page.page import report_page
from hf_lowrank.report.public import public_report
from hf_lowrank.report.sections import Data
from tests.report.test_page import full_report


def public(**fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(public_report(json.dumps(fields)))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/home/ada/texts/wiki.raw", "wiki.raw"),
        ("../texts/wiki.raw", "wiki.raw"),
        ("texts/wiki.jsonl", "wiki.jsonl"),
        ("models/tiny.gguf", "tiny.gguf"),
        ("C:\\Users\\ada\\tiny", "tiny"),
        ("~/models/tiny/", "tiny"),
        ("demo", "demo"),
        (".", "."),
        ("acme/dense", "acme/dense"),
        ("acme/dense-1.5", "acme/dense-1.5"),
        (
            "Salesforce/wikitext:wikitext-2-raw-v1:test",
            "Salesforce/wikitext:wikitext-2-raw-v1:test",
        ),
    ],
)
def test_only_local_paths_are_shortened(source: str, expected: str):
    found = public(model=source, data={"calibration": source, "tokens": 5})
    assert found == {"model": expected, "data": {"calibration": expected, "tokens": 5}}


def test_what_exists_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "acme" / "dense").mkdir(parents=True)
    assert public(model="acme/dense") == {"model": "acme/dense"}
    monkeypatch.chdir(tmp_path)
    assert public(model="acme/dense") == {"model": "dense"}


def test_arguments_and_the_command_of_a_task_are_shortened_too():
    found = public(
        model="/home/ada/models/bert",
        arguments={"model": "/home/ada/models/bert", "data_dir": "/data/my texts", "epochs": 3.0},
        command="python /home/ada/run_qa.py --model /home/ada/models/bert "
        "--data_dir /data/my texts --cache_dir=/scratch/x --output_dir .",
        ranks={"bert.a": 3},
        samples=[{"prompt": "/home is a folder"}],
    )
    assert found["arguments"] == {"model": "bert", "data_dir": "my texts", "epochs": 3.0}
    assert found["command"] == (
        "python run_qa.py --model bert --data_dir my texts --cache_dir=x --output_dir ."
    )
    assert found["ranks"] == {"bert.a": 3}
    assert found["samples"] == [{"prompt": "/home is a folder"}]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run.py", "--model", "/home/ada/my models/bert"], ["run.py", "--model", "bert"]),
        (["/home/ada/a b/run.py", "--text=../ada's texts/b.txt"], ["run.py", "--text=b.txt"]),
        (["run.py", "--cache_dir", "~/x y/z z"], ["run.py", "--cache_dir", "z z"]),
        (["run.py", "C:\\Users\\ada\\out", "a/b/c"], ["run.py", "out", "c"]),
        (
            ["run.py", "--model", "acme/dense", "--sample_prompt", 'He said "no"', "0.8"],
            ["run.py", "--model", "acme/dense", "--sample_prompt", 'He said "no"', "0.8"],
        ),
    ],
)
def test_a_command_keeps_its_words_and_loses_its_folders(words: list[str], expected: list[str]):
    found = public(model="acme/dense", command=shlex.join(["python", *words]))
    assert found["command"] == shlex.join(["python", *expected])


def test_a_folder_that_exists_here_is_left_out_of_the_command_but_the_script_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for folder in ("scripts", "secret/out"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "scripts" / "run.py").touch()
    monkeypatch.chdir(tmp_path)
    found = public(model="demo", command="python scripts/run.py --output_dir secret/out")
    assert found["command"] == "python scripts/run.py --output_dir out"


@pytest.mark.parametrize("text", ["[1, 2]\n", "no report", ""])
def test_what_is_no_report_stays_as_it_is(text: str):
    assert public_report(text) == text


def test_page_and_card_name_no_folder():
    local = full_report(
        model="/home/ada/models/tiny",
        data=Data(calibration="/home/ada/a.txt", evaluation="texts/b.txt", train_tokens=7),
    )
    for text in (report_page(local), str(model_card(local, "ada/small"))):
        assert "/home" not in text
        assert "texts/" not in text
        assert "tiny" in text
        assert "b.txt" in text

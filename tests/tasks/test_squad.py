"""Files in SQuAD's format: what is read, how it is split, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.tasks.squad_data import load_squad, split_by_article, take_questions
from tests.squad import article, write_squad


def load(folder: Path, sizes: list[int]) -> Dataset:
    articles = [article(i, size) for i, size in enumerate(sizes)]
    return load_squad(write_squad(folder / "squad.json", articles))


def test_questions_come_in_the_order_of_the_file(tmp_path: Path):
    data = load(tmp_path, [3, 2])
    assert data["id"] == ["0-0", "0-1", "0-2", "1-0", "1-1"]
    assert data["title"] == ["title 0"] * 3 + ["title 1"] * 2
    row = data[0]
    assert row["answers"]["text"] == ["w91 w92", "w91"]
    begin = row["answers"]["answer_start"][0]
    assert row["context"][begin:].startswith("w91 w92")
    assert data[0]["context"] == data[1]["context"] != data[2]["context"]


def test_a_byte_order_mark_and_missing_titles(tmp_path: Path):
    articles = [article(0), article(1)]
    for part in articles:
        del part["title"]
    path = tmp_path / "squad.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"data": articles}).encode())
    assert sorted(set(load_squad(path)["title"])) == ["article 1", "article 2"]


@pytest.mark.parametrize("seed", range(4))
def test_parts_share_no_article_and_keep_the_share(tmp_path: Path, seed: int):
    data = load(tmp_path, [4, 8, 2, 6, 4, 10, 2, 4])
    first, second = split_by_article(data, 0.8, seed)
    assert not set(first["title"]) & set(second["title"])
    assert sorted([*first["id"], *second["id"]]) == sorted(data["id"])
    assert abs(len(first) - 32) <= 3
    again, _ = split_by_article(data, 0.8, seed)
    assert again["id"] == first["id"]


def test_other_seeds_give_other_articles(tmp_path: Path):
    data = load(tmp_path, [2] * 10)
    parts = {tuple(split_by_article(data, 0.5, seed)[0]["id"]) for seed in range(4)}
    assert len(parts) > 1


def test_each_part_gets_an_article(tmp_path: Path):
    data = load(tmp_path, [2, 20])
    for share in (0.01, 0.99):
        assert all(len(part) for part in split_by_article(data, share, 0))
    with pytest.raises(DataError, match=r"1 article can't be split by article"):
        split_by_article(load(tmp_path, [4]), 0.8, 0)
    with pytest.raises(ConfigError, match=r"share must lie in \(0, 1\), got 1"):
        split_by_article(data, 1, 0)


def test_a_subset_is_seeded_and_in_proportion(tmp_path: Path):
    data = load(tmp_path, [8, 8, 8])
    parts = [data.select(range(16)), data.select(range(16, 24))]
    first, second = take_questions(parts, 12, 0)
    assert (len(first), len(second)) == (8, 4)
    assert first["id"] == sorted(first["id"])
    assert set(first["id"]) <= set(parts[0]["id"])
    assert take_questions(parts, 12, 0)[0]["id"] == first["id"]
    assert take_questions(parts, 12, 1)[0]["id"] != first["id"]
    assert [len(part) for part in take_questions(parts, 0, 0)] == [16, 8]
    assert [len(part) for part in take_questions(parts, 99, 0)] == [16, 8]
    with pytest.raises(DataError, match="1 questions leave a part of the data empty"):
        take_questions(parts, 1, 0)


def change(**changes: Any) -> dict[str, Any]:
    """A file whose first question is changed; None drops a field."""
    found = copy.deepcopy(article(0))
    question = found["paragraphs"][0]["qas"][0]
    for name, value in changes.items():
        question[name] = value
        if value is None:
            del question[name]
    return {"data": [found]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not in SQuAD's format: the file has list indices"),
        ({"questions": []}, "is not in SQuAD's format: the file has no 'data'"),
        ({"data": []}, "holds no questions"),
        ({"data": [{"title": "t"}]}, "article 1 has no 'paragraphs'"),
        ({"data": ["text"]}, "article 1 has"),
        (change(answers=None), "article 1 has no 'answers'"),
        (change(question=7), "article 1 has a question that is no text: 7"),
        (change(answers=[{"text": "w91"}]), "article 1 has no 'answer_start'"),
        (change(answers=[]), "1 of 4 questions have no answer, as in SQuAD 2.0"),
        (
            change(answers=[{"text": "w91", "answer_start": 1}]),
            "question 0-0: the answer 'w91' does not stand at character 1 of its context",
        ),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit(content: Any, message: str, tmp_path: Path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"squad\.json: ") as caught:
        load_squad(path)
    assert message in str(caught.value)


def test_files_that_are_no_json(tmp_path: Path):
    path = tmp_path / "squad.json"
    for content in (b"id\tquestion\n", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"squad\.json: can't be read as JSON"):
            load_squad(path)
    with pytest.raises(DataError, match="nowhere: can't be read"):
        load_squad(tmp_path / "nowhere")

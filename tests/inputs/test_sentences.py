"""Lines of text as padded batches."""

from pathlib import Path

import pytest

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.sentences import read_pairs, read_sentences, sentence_batches, tokenized
from tests.scripts import word_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    words = [" ".join(["w01"] * (1 + i % 5) + [f"w{10 + i}"]) for i in range(40)]
    path.write_text("\n".join(["", words[0], *words, "  "]))
    return str(path)


def test_a_line_is_a_sentence_and_counts_once(text: str):
    assert len(read_sentences(text)) == 40
    assert all("\n" not in line for line in read_sentences("demo"))


def test_sentences_are_spread_and_roles_do_not_share_any(text: str):
    tokenizer = word_tokenizer()

    def taken(part: tuple[float, float], count: int = 99) -> set[tuple[int, ...]]:
        batches = sentence_batches(
            text, tokenizer, sentences=count, max_length=16, part=part, batch_size=4
        )
        return {
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }

    first, last = taken((0.0, 0.75)), taken((0.75, 1.0))
    assert (len(first), len(last), len(first & last)) == (30, 10, 0)
    assert len(taken((0.0, 1.0), 7)) == 7


def test_batches_are_about_equally_long_unless_the_order_is_to_stay():
    tokenizer = word_tokenizer()
    sentences = ["w01 w02 w03 w04", "w05", "w06 w07 w08", "w09"]
    sorted_ones = tokenized(sentences, tokenizer, 3, 2)
    assert [batch["input_ids"].shape for batch in sorted_ones] == [(2, 1), (2, 3)]
    kept = tokenized(sentences, tokenizer, 8, 2, by_length=False)
    assert kept[0]["attention_mask"].sum(1).tolist() == [4, 1]


def test_too_few_lines_and_odd_columns_are_refused(tmp_path: Path):
    path = tmp_path / "one.txt"
    path.write_text("w01\n")
    with pytest.raises(DataError, match=r"one\.txt: has too few lines for calibration text; give"):
        sentence_batches(
            str(path),
            word_tokenizer(),
            sentences=4,
            max_length=8,
            role="calibration",
            part=(0, 0.75),
        )
    with pytest.raises(DataError, match=r"^sts_columns are two sentences and a score; got a b\.$"):
        read_pairs(path, ["a", "b"])
    with pytest.raises(DataError, match=r"no\.tsv: can't be read"):
        read_pairs(tmp_path / "no.tsv")

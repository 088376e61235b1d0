"""Files in columns, spans in tags, and the first token of each word."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_lowrank.errors import DataError
from hf_lowrank.tasks.conll_data import load_conll
from hf_lowrank.tasks.ner import first_tokens
from hf_lowrank.tasks.spans import iob2, span_scores, spans

# Spans


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("O O", []),
        ("B-A I-A O B-A", [(0, 2, "A"), (3, 4, "A")]),
        ("B-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
        ("I-A I-A O I-A", [(0, 2, "A"), (3, 4, "A")]),  # IOB1
        ("I-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),  # IOB1: two of a type side by side
        ("B-A I-B I-B", [(0, 1, "A"), (1, 3, "B")]),
        ("B-A I-A E-A S-B O", [(0, 3, "A"), (3, 4, "B")]),  # IOBES
        ("B-A E-A I-A S-A E-A", [(0, 2, "A"), (2, 3, "A"), (3, 4, "A"), (4, 5, "A")]),
        ("B-LOC-x I-LOC-x", [(0, 2, "LOC-x")]),
    ],
    ids=str,
)
def test_spans_of_all_ways_to_tag(tags: str, wanted: list[tuple[int, int, str]]):
    assert spans(tags.split()) == wanted
    assert spans(iob2(tags.split())) == wanted


def test_tags_are_brought_to_iob2():
    assert iob2(["I-A", "I-A", "B-A", "O", "S-B", "E-B"]) == [
        "B-A",
        "I-A",
        "B-A",
        "O",
        "B-B",
        "B-B",
    ]


def test_scores_of_whole_spans_by_hand():
    """Right: (0, 2) A and (3, 4) B; wrong: a type, a border, and one too many; one is missed."""
    found = [["B-A", "I-A", "O", "B-B", "B-A", "O", "B-B"], ["B-B", "I-B", "O", "O"], ["O", "B-A"]]
    gold = [["B-A", "I-A", "O", "B-B", "B-B", "O", "O"], ["B-B", "O", "O", "B-A"], ["O", "O"]]
    scores = span_scores(found, gold)
    assert list(scores) == ["f1", "precision", "recall", "accuracy"]
    precision, recall = 2 / 6, 2 / 5  # 4 + 1 + 1 found, 3 + 2 + 0 in gold
    assert scores["precision"] == pytest.approx(precision)
    assert scores["recall"] == pytest.approx(recall)
    assert scores["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["accuracy"] == pytest.approx(8 / 13)


def test_scores_without_spans_are_nothing():
    wanted = {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
    assert span_scores([["O", "O"]], [["O", "O"]]) == wanted
    assert span_scores([["O"], ["B-A"]], [["B-A"], ["O"]])["f1"] == 0.0
    assert span_scores([["B-A"], ["O"]], [["B-A"], ["O"]])["f1"] == 1.0  # not across sentences


# Files


def read(folder: Path, text: str, **columns: int) -> list[dict[str, list[str]]]:
    path = folder / "train.txt"
    path.write_bytes(text.encode())
    return load_conll(path, **columns).to_list()


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_columns_of_conll_2003(ending: str, tmp_path: Path):
    lines = ["\ufeff-DOCSTART- -X- -X- O", "", "EU NNP B-NP I-ORG", "rejects VB B-VP O", "", ""]
    lines += ["Peter NNP B-NP I-PER", "Black NNP I-NP I-PER", "-DOCSTART- -X- O O", ". . O O"]
    assert read(tmp_path, ending.join(lines)) == [
        {"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"words": ["Peter", "Black"], "tags": ["B-PER", "I-PER"]},
        {"words": ["."], "tags": ["O"]},
    ]


def test_other_columns_and_tabs_around_words_with_blanks(tmp_path: Path):
    found = read(tmp_path, "1\tNew York\tB-LOC\tO\n2\t#\tO\tO\n", word_column=2, tag_column=3)
    assert found == [{"words": ["New York", "#"], "tags": ["B-LOC", "O"]}]


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("a O\n\nb\n", {}, "line 3 has 1 columns; at least 2 are needed for a word and its tag"),
        ("a O\n", {"tag_column": 4}, "line 1 has 2 columns; at least 4 are needed"),
        ("a O\nb NN\n", {}, "line 2 has the tag 'NN'; expected O, or B, I, E or S with a type"),
        ("a B\n", {}, "line 1 has the tag 'B'; expected O"),
        ("a o\n", {}, "line 1 has the tag 'o'; expected O"),
        ("a O\n\tO\n", {}, "line 2 has no word in column 1"),
        ("\n \n", {}, "holds no sentence; expected a word and a tag in each line"),
        ("-DOCSTART- O\n", {}, "holds no sentence"),
        ("a O\n", {"word_column": 2}, "word_column 2 and tag_column 0 are the same"),
    ],
)
def test_a_file_that_does_not_fit(text: str, columns: dict[str, int], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=rf"train\.txt: {message}"):
        read(tmp_path, text, **columns)


def test_words_may_hold_other_blanks_and_look_like_the_start_of_a_document(tmp_path: Path):
    found = read(tmp_path, "10\u00a0000  O\n-DOCSTART-ing O\n")
    assert found == [{"words": ["10\u00a0000", "-DOCSTART-ing"], "tags": ["O", "O"]}]


def test_files_that_are_no_text(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"\xff\xfe O\n")
    for name in ("x", "nowhere"):
        with pytest.raises(DataError, match=rf"{name}: can't be read"):
            load_conll(tmp_path / name)


# Tokens


def pieces() -> PreTrainedTokenizerFast:
    """Words in pieces of a letter, of which all but the first begin with ##."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}
    for letter in "abc":
        vocabulary |= {letter: len(vocabulary), f"##{letter}": len(vocabulary) + 1}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize(("length", "wanted"), [(20, [1, 4, 5, 7]), (7, [1, 4, 5, -1])])
def test_the_first_piece_of_each_word(length: int, wanted: list[int]):
    words = ["abc", "b", "ca", "xyz"]
    found = pieces()(
        " ".join(words), return_offsets_mapping=True, truncation=True, max_length=length
    )
    assert first_tokens(words, found["offset_mapping"]) == wanted


def test_tokens_that_begin_with_the_blank_before_a_word():
    """As those of SentencePiece; a blank by itself is no part of a word, nor is a special token."""
    offsets = [(0, 0), (0, 2), (2, 5), (5, 6), (6, 8), (0, 0)]
    assert first_tokens(["ab", "cd", "ef"], offsets) == [1, 2, 4]
    assert first_tokens(["a", "b", "cd"], [(0, 3), (3, 6)]) == [0, -1, 1]  # one token for two words

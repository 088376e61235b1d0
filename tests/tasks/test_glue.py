"""GLUE's files as they are distributed, and what is wrong with the others."""

import json
import sys
from pathlib import Path

import pytest

from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.tasks import glue_data as glue
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task
from hf_lowrank.tasks.glue_data import TASKS, load_glue

MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
HEADERS = {
    "sst2": ("sentence\tlabel", "{a}\t{label}"),
    "mrpc": (MRPC_HEADER, "{label}\t7\t8\t{a}\t{b}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2012\t1\tnone\tnone\t{a}\t{b}\t{label}",
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{a}\t{b}\t{label}"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1e\tfiction\tp\tp\tp\tp\t{a}\t{b}\tneutral\t{label}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}"),
}


def write(folder: Path, task: str, text: str, name: str = "train.tsv") -> Path:
    path = folder / TASKS[task].folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


def rows(folder: Path, task: str, split: str = "train") -> list[dict]:
    return load_glue(task, split, str(folder)).to_list()


@pytest.mark.parametrize("task", HEADERS)
def test_the_original_columns_of_every_task(task: str, tmp_path: Path):
    header, line = HEADERS[task]
    labels = TASKS[task].labels or ("2.500", "0.000")
    lines = [line.format(a=f"a{i}", b=f"b{i}", label=label) for i, label in enumerate(labels)]
    write(tmp_path, task, "\n".join([header, *lines]) + "\n")
    expected = [
        {"sentence1": f"a{i}", "label": i if TASKS[task].labels else float(label)}
        | ({} if task == "sst2" else {"sentence2": f"b{i}"})
        for i, label in enumerate(labels)
    ]
    assert rows(tmp_path, task) == expected


def test_cola_has_no_header(tmp_path: Path):
    write(tmp_path, "cola", "gj04\t1\t\tOur friends won't buy it.\ngj04\t0\t*\tThem bought it.\n")
    assert rows(tmp_path, "cola") == [
        {"sentence1": "Our friends won't buy it.", "label": 1},
        {"sentence1": "Them bought it.", "label": 0},
    ]


def test_quotes_and_odd_characters_are_plain_characters(tmp_path: Path):
    odd = ['"He said', 'it" he said', "'tis\u2028so", "a,b;c|d", "\x85 caf\u00e9 \\n"]
    lines = [f"1\t1\t2\t{text}\tplain" for text in odd]
    write(tmp_path, "mrpc", "\n".join([MRPC_HEADER, *lines]))
    assert [row["sentence1"] for row in rows(tmp_path, "mrpc")] == odd


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_endings_and_blank_lines(ending: str, tmp_path: Path):
    write(tmp_path, "sst2", ending.join(["sentence\tlabel", "good\t1", "", "bad\t0", ""]))
    assert [row["label"] for row in rows(tmp_path, "sst2")] == [1, 0]


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path):
    """MRPC's original file starts with one, and so with the name of the label's column."""
    write(tmp_path, "mrpc", f"\ufeff{MRPC_HEADER}\n1\t1\t2\ta\tb\n")
    assert rows(tmp_path, "mrpc") == [{"sentence1": "a", "sentence2": "b", "label": 1}]


def test_json_lines_with_names_or_numbers_as_labels(tmp_path: Path):
    lines = [
        {"sentence1": 'a "quoted"\ttab', "sentence2": "b", "label": "not_entailment"},
        {"label": 0, "sentence2": "d", "sentence1": "c", "more": [1]},
    ]
    write(tmp_path, "rte", "\n".join(map(json.dumps, lines)), "train.jsonl")
    assert rows(tmp_path, "rte") == [
        {"sentence1": 'a "quoted"\ttab', "sentence2": "b", "label": 1},
        {"sentence1": "c", "sentence2": "d", "label": 0},
    ]


def test_splits_and_places(tmp_path: Path):
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "dev.tsv").write_text("x\t1\t\tdev\n")
    (tmp_path / "train.tsv").write_text("x\t1\t\ttrain\n")
    assert rows(tmp_path, "cola")[0]["sentence1"] == "train"
    assert rows(tmp_path, "cola", "validation")[0]["sentence1"] == "dev"
    header, line = HEADERS["mnli"]
    assert TASKS["mnli"].num_labels == 3
    assert TASKS["stsb"].num_labels == 1
    header = header.replace("sentence1\tsentence2", "premise\thypothesis")
    header = header.replace("gold_label", "label")
    write(
        tmp_path, "mnli", f"{header}\n{line.format(a=1, b=2, label='neutral')}", "dev_matched.tsv"
    )
    with pytest.raises(DataError, match=r"has no train file of rte; expected RTE/train\.tsv or"):
        load_glue("rte", "train", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", "sentence\tlabel\ngood\t2\n", r"line 2 has label '2'; expected 0, 1\."),
        ("sst2", "sentence\tlabel\ngood\t-1\n", r"line 2 has label '-1'; expected 0, 1\."),
        ("sst2", "sentence\tlabel\ngood\t\n", r"line 2 has label ''; expected 0, 1\."),
        ("sst2", "sentence\tlabel\ngood\t1\nbad\n", "line 3 has 1 columns, which is too few"),
        ("sst2", "sentence\tlabel\n", "sst2: the train split is empty"),
        ("sst2", "", "sst2: the train split is empty"),
        ("sst2", "text\tlabel\na\t1\n", "column 'sentence' is missing; the header has text, label"),
        ("cola", "x\tyes\t\ttext\n", r"line 1 has label 'yes'; expected 0, 1\."),
        ("cola", "x\t1\ttext\n", "line 1 has 3 columns, which is too few"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\thigh\n", "label 'high'; expected a number"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "label 'nan'; expected a number"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\tneutral\n", "expected entailment, not_entail"),
    ],
)
def test_a_file_that_does_not_fit(task: str, text: str, message: str, tmp_path: Path):
    write(tmp_path, task, text)
    with pytest.raises(DataError, match=message):
        load_glue(task, "train", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence1": "a", "sentence2": "b"}', "line 1 has no usable 'label'"),
        ('{"sentence1": "a", ', "line 1 has no usable"),
        ('["a", "b", 1]', "line 1 has no usable"),
        ('{"sentence1": "a", "sentence2": "b", "label": "maybe"}', "line 1 has label 'maybe'"),
        ('{"sentence1": "a", "sentence2": null, "label": 1}', "line 1 has no usable"),
    ],
)
def test_json_lines_that_do_not_fit(line: str, message: str, tmp_path: Path):
    write(tmp_path, "rte", line + "\n", "train.jsonl")
    with pytest.raises(DataError, match=message):
        load_glue("rte", "train", str(tmp_path))


def test_bytes_that_are_no_text(tmp_path: Path):
    write(tmp_path, "cola", "").write_bytes(b"x\t1\t\t\xff\xfe\n")
    with pytest.raises(DataError, match=r"train\.tsv: can't be read"):
        load_glue("cola", "train", str(tmp_path))


def test_unknown_names_and_a_hub_that_is_not_there(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"task must be one of cola, .*; got 'ax'"):
        load_glue("ax", "train", str(tmp_path))
    with pytest.raises(ConfigError, match="split must be one of train, validation; got 'test'"):
        load_glue("rte", "test", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(glue, "load_dataset", unreachable)
    message = r"GLUE rte: the Hub can't be reached \(no route\); offline, give --data_dir"
    with pytest.raises(DataError, match=message):
        load_glue("rte", "train")


def test_the_hubs_columns_and_the_matched_split(monkeypatch):
    asked = []

    def hub(name, task, split):
        asked.append((name, task, split))
        return [{"premise": "p", "hypothesis": "h", "sentence1": "s", "sentence2": "t", "label": 2}]

    monkeypatch.setattr(glue, "load_dataset", hub)
    found = load_glue("mnli", "validation").to_list()
    assert found == [{"sentence1": "p", "sentence2": "h", "label": 2}]
    assert load_glue("mrpc", "train").to_list()[0]["sentence1"] == "s"
    assert asked == [
        ("nyu-mll/glue", "mnli", "validation_matched"), ("nyu-mll/glue", "mrpc", "train")
    ]  # fmt: skip


def test_tasks_name_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    for name in ("evaluate", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    wanted = r"^Tasks need evaluate, sklearn, not installed: pip install 'hf-lowrank\[tasks\]'\.$"
    with pytest.raises(ConfigError, match=wanted):
        load_glue_task(GlueArguments(model="none"))

"""`benchmark.py frontier` on a tiny model: rows of every kind, their bytes, and the table."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.frontier import FrontierArguments, measure_frontier
from benchmarks.frontier_rows import ROWS, Workshop, file_bytes, missing_rows, resident_bytes
from benchmarks.frontier_table import draw_frontier, format_frontier, pareto
from hf_lowrank import config
from hf_lowrank.compression.options import Run
from hf_lowrank.errors import ConfigError
from tests.scripts import make_inputs, word_tokenizer
from tests.tiny_models import tiny_llama

pytest.importorskip("torchao.quantization")

NAMES = ["dense-fp32", "dense-bf16", "int8", "int4", "hqq3", "hqq2+0.1"]
CUT = ["0.8", "0.8-int8", "0.6-int4", "0.6-recovered"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("frontier")
    inputs = make_inputs(folder)
    args = FrontierArguments(
        model=str(inputs.model),
        calibration=[str(inputs.calibration)],
        calibration_sequences=16,
        held_out_sequences=4,
        evaluation=[str(inputs.evaluation)],
        evaluation_sequences=8,
        sequence_length=32,
        rows=[*NAMES, *CUT],
        prompt_tokens=16,
        new_tokens=2,
        repeats=1,
        picture=str(folder / "picture.svg"),
        output_dir=str(folder / "rows"),
    )
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "DEFAULT_FORM", "compact")
        measure_frontier(args)
    torch.set_num_threads(threads)
    return args, {
        name: json.loads((folder / "rows" / f"{name}.json").read_text("utf-8"))
        for name in (*NAMES, *CUT)
    }


def text_of(row):
    return row["texts"]["evaluation.txt"]


def test_every_kind_of_row_is_made_read_again_and_measured(measured):
    _, rows = measured
    for name, row in rows.items():
        assert row["row"] == name
        assert row["seconds"] > 0
        assert row["threads"] == 1
        for phase, tokens in {"prefill": 16, "decode": 2}.items():
            found = row["speed"][phase]
            [own], [dense] = found["seconds"]["row"], found["seconds"]["dense"]
            assert found["per_second"] == pytest.approx(tokens / own)
            assert found["ratio"] == pytest.approx(dense / own)
        assert row["bits"] == pytest.approx(8 * row["bytes"] / row["parameters"])
        assert text_of(row)["loss_before"] == text_of(rows["dense-fp32"])["loss_before"]


def test_the_dense_row_is_the_dense_model_and_bf16_the_noise_floor(measured):
    _, rows = measured
    assert rows["dense-fp32"]["kl"] == {"mean": 0, "median": 0, "p99": 0}
    assert text_of(rows["dense-fp32"])["loss_difference"] == 0
    floor = rows["dense-bf16"]["kl"]["mean"]
    assert 0 < floor < 1e-3
    assert all(rows[name]["kl"]["mean"] > 3 * floor for name in (*NAMES[3:], *CUT))


def test_fewer_bits_take_less_and_are_further_from_the_dense_model(measured):
    _, rows = measured
    for names in (["dense-fp32", "dense-bf16", "int8", "int4"], ["0.8", "0.8-int8"]):
        sizes = [rows[name]["bytes"] for name in names]
        assert sizes == sorted(sizes, reverse=True)
    assert rows["int8"]["kl"]["mean"] < rows["int4"]["kl"]["mean"] < rows["hqq2+0.1"]["kl"]["mean"]


def test_rows_that_are_there_are_not_run_again(measured, monkeypatch, capsys):
    args, rows = measured
    monkeypatch.setattr("benchmarks.frontier.load_causal_lm", None)
    measure_frontier(args)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rows)


@pytest.mark.parametrize("name", ["dense-bf16", "int4", "hqq3"])
def test_bytes_are_those_of_the_file_and_of_what_is_in_it(name, tmp_path):
    model = tiny_llama()
    shop = Workshop(model, word_tokenizer(), Run(), tmp_path / "seconds")
    shop.make(ROWS[name], tmp_path / "file")
    [path] = (tmp_path / "file").glob("*.safetensors")
    size = file_bytes(tmp_path / "file")
    assert size == len(path.read_bytes())
    inside = sum(each.numel() * each.element_size() for each in load_file(path).values())
    assert 0 < size - inside < 0.5 * size  # the header
    linear = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 64)  # weights of the layers
    others = sum(each.numel() for each in model.parameters()) - linear
    of_layers = {
        "dense-bf16": 2 * linear,
        "int4": linear // 2 + 2 * linear // 32,
        # Rows of 32 numbers are a group of 32, rows of 64 one of 64.
        "hqq3": 3 * linear // 8 + 2 * 2 * 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32),
    }
    assert inside == 2 * others + of_layers[name]
    in_memory = resident_bytes(shop.load(ROWS[name], tmp_path / "file", "float32"))
    if name == "dense-bf16":
        assert in_memory == pytest.approx(inside, rel=0.01)  # and the angles of positions
    else:  # a byte for each number, the rest in fp32
        assert linear + 4 * others < in_memory < 1.3 * linear + 4 * others


def row(name, size, perplexity):
    return {"row": name, "bytes": size, "texts": {"text": {"perplexity_after": perplexity}}}


def perplexity(row):
    return row["texts"]["text"]["perplexity_after"]


def test_pareto_rows_are_those_that_none_beats():
    rows = [
        row("large and good", 100, 10.0),
        row("as good and larger", 110, 10.0),
        row("small", 50, 20.0),
        row("as small and worse", 50, 21.0),
        row("between and worse than small", 60, 30.0),
        row("its twin", 50, 20.0),
    ]
    assert pareto(rows, perplexity) == {"large and good", "small", "its twin"}


def test_the_table_is_sorted_by_bytes_marks_the_front_and_prints_losers(measured):
    _, rows = measured
    lines = format_frontier(list(rows.values())).splitlines()
    header = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert [header[0], header[4], header[-1]] == ["row", "evaluation.txt", "Pareto"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert {cell[0].strip("*") for cell in cells} == set(rows)
    front = pareto(list(rows.values()), lambda row: text_of(row)["perplexity_after"])
    for cell in cells:
        assert cell[0].startswith("**") == (cell[-1] == "evaluation.txt")
        assert (cell[0].strip("*") in front) == (cell[-1] == "evaluation.txt")
    sizes = [rows[cell[0].strip("*")]["bytes"] for cell in cells]
    assert sizes == sorted(sizes, reverse=True)


def test_the_picture_names_every_family(measured):
    args, rows = measured
    text = "".join(ET.parse(args.picture).getroot().itertext())
    assert all(row["family"] in text for row in rows.values())


def test_rows_that_are_far_off_are_named_below_the_picture_and_not_drawn(tmp_path):
    rows = [
        {**row(name, size, perplexity), "family": family}
        for name, family, size, perplexity in (
            ("a", "near", 1e7, 20.0),
            ("b", "near", 2e7, 21.0),
            ("c", "near", 3e7, 22.0),
            ("bad", "lost", 2e7, 900.0),
            ("huge", "lost", 9e7, 20.0),
        )
    ]
    draw_frontier(rows, tmp_path / "picture.svg")
    text = "".join(ET.parse(tmp_path / "picture.svg").getroot().itertext())
    assert "far off: bad, huge" in text
    assert "near" in text
    assert "lost" not in text


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no row of the frontier"):
        draw_frontier([], tmp_path / "picture.svg")


def test_unknown_rows_are_refused_with_those_that_are_there(tmp_path):
    with pytest.raises(ConfigError, match="rows: there is no 'hqq5'; choose of dense-fp32, "):
        missing_rows(["int8", "hqq5"], tmp_path)


def test_rows_without_a_file_are_missing_all_where_none_is_named(tmp_path):
    (tmp_path / "int8.json").touch()
    assert list(missing_rows(None, tmp_path)) == [name for name in ROWS if name != "int8"]
    assert list(missing_rows(["int8", "hqq2"], tmp_path)) == ["hqq2"]


def test_a_type_that_is_left_open_is_refused(tmp_path):
    args = FrontierArguments(dtype="auto", output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="dtype must be named here"):
        measure_frontier(args)

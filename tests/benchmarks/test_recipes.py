"""`benchmark.py recipe` on a tiny model: its rows, with weights in int8 and with questions."""

import json

import pytest

from benchmarks.recipe import RecipeArguments, compare_recipes
from tests.scripts import WORDS, make_inputs

NAMES = ["ranks, factors", "ranks, compact", "ranks+measured, compact"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("recipe")
    inputs = make_inputs(folder)
    questions = folder / "questions.jsonl"
    asked = [
        {"question": WORDS[i], "choices": [WORDS[i + 1], WORDS[i + 2]], "answer": i % 2}
        for i in range(6)
    ]
    questions.write_text("\n".join(map(json.dumps, asked)), "utf-8")
    args = RecipeArguments(
        model=str(inputs.model),
        param_ratio=[0.6],
        recipes=NAMES,
        calibration=[str(inputs.calibration)],
        calibration_sequences=8,
        held_out_sequences=4,
        evaluation=[str(inputs.evaluation)],
        evaluation_sequences=8,
        questions=[str(questions)],
        sequence_length=32,
        weights=["int8"],
        output_dir=str(folder / "rows"),
    )
    compare_recipes(args)
    found = {}
    for path in (folder / "rows").iterdir():
        row = json.loads(path.read_text("utf-8"))
        found[row["recipe"]] = row
    compare_recipes(args)  # nothing is run again
    assert all(
        json.loads(path.read_text("utf-8")) in found.values()
        for path in (folder / "rows").iterdir()
    )
    return found


def test_both_forms_keep_the_same_share(rows):
    assert set(rows) == set(NAMES)
    assert all(0.55 < row["kept"] <= 0.6 for row in rows.values())


def test_int8_is_measured_after_the_same_cut_and_is_smaller(rows):
    for row in rows.values():
        [quantized] = row["quantized"].values()
        assert quantized["bytes"] < row["bytes"]
        (before, after) = (each["texts"]["evaluation.txt"] for each in (row, quantized))
        assert before["loss_before"] == after["loss_before"]
        assert before["loss_after"] != after["loss_after"]
        assert after["loss_after"] == pytest.approx(before["loss_after"], abs=0.05)


def test_questions_are_asked_of_both_models_once(rows):
    for row in rows.values():
        found = row["questions"]["questions"]
        assert found["questions"] == 6
        assert found["difference"] == pytest.approx(found["after"] - found["before"])
        assert not any(each["questions"] for each in row["quantized"].values())

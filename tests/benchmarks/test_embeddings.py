"""The comparison on embeddings, on a tiny encoder."""

import json
from pathlib import Path

import pytest

from tests.scripts import InProcess, lines, save_encoder


def test_every_method_has_a_row_and_finished_rows_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    benchmark = InProcess("benchmark", monkeypatch, capsys)
    pairs, texts, rows = tmp_path / "dev.tsv", tmp_path / "text.txt", tmp_path / "rows"
    texts.write_text(
        "\n".join(f"{a} {b} {a}" for a, b in zip(lines(60, 4), lines(60, 5), strict=True))
    )
    scored = [
        f"{a}\t{b}\t{i % 3}"
        for i, (a, b) in enumerate(zip(lines(12, 6), lines(12, 7), strict=True))
    ]
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *scored]))
    arguments = [
        *("embeddings", "--model", save_encoder(tmp_path / "model"), "--pairs", pairs),
        *("--texts", texts, "--calibration_sentences", 24, "--held_out_sentences", 8),
        *("--train_sentences", 16, "--param_ratio", 0.4, "--layers", 1, "--batch_size", 8),
        *("--output_dir", rows, "--recover_steps", 8),
    ]
    methods = ("price and channels, compact", "plain SVD, factors", "fewer layers")
    done = benchmark(*arguments, "--methods", *methods)
    assert done.code == 0, done.err
    found = {
        row["method"]: row for row in map(json.loads, (p.read_text() for p in rows.glob("*.json")))
    }
    assert set(found) == set(methods)
    for row in found.values():
        assert row["dense"]["cosine"] == pytest.approx(1, abs=1e-5)
        assert row["dense"]["neighbours"] == 1
        assert row["recovery"]["loss_before"] == pytest.approx(row["recovery"]["loss_before"])
        assert row["cut"]["cosine"] < 1
    price, plain = (found[name] for name in methods[:2])
    assert price["cut"]["cosine"] > plain["cut"]["cosine"]
    assert price["kept"] <= 0.4
    assert found["fewer layers"]["kept"] == 0.5
    before = {path: path.stat().st_mtime_ns for path in rows.glob("*.json")}
    assert benchmark(*arguments, "--methods", *methods).out.count("→") == 12
    assert {path: path.stat().st_mtime_ns for path in rows.glob("*.json")} == before

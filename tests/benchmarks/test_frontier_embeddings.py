"""`benchmark.py frontier-embeddings` on a tiny encoder."""

import json

import pytest
import torch

from benchmarks.frontier_embeddings import EmbeddingFrontierArguments, measure_embedding_frontier
from tests.scripts import lines, save_encoder

pytest.importorskip("torchao.quantization")

NAMES = ["dense-fp32", "dense-bf16", "int8", "hqq2", "hqq2+0.1", "0.5-int8", "0.6-recovered"]


def test_every_kind_of_row_is_scored_against_its_bytes(tmp_path, capsys):
    pairs, texts = tmp_path / "dev.tsv", tmp_path / "text.txt"
    texts.write_text(
        "\n".join(f"{a} {b} {a}" for a, b in zip(lines(60, 4), lines(60, 5), strict=True))
    )
    scored = [f"{a}\t{b}\t{len(a) % 3}" for a, b in zip(lines(12, 6), lines(12, 7), strict=True)]
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *scored]))
    args = EmbeddingFrontierArguments(
        model=str(save_encoder(tmp_path / "model")),
        pairs=str(pairs),
        texts=[str(texts)],
        calibration_sentences=24,
        held_out_sentences=8,
        train_sentences=0,
        batch_size=8,
        rows=NAMES,
        picture=str(tmp_path / "picture.svg"),
        output_dir=str(tmp_path / "rows"),
    )
    threads = torch.get_num_threads()
    measure_embedding_frontier(args)
    torch.set_num_threads(threads)
    rows = {name: json.loads((tmp_path / "rows" / f"{name}.json").read_text()) for name in NAMES}
    cosines = {name: row["scores"]["cosine"] for name, row in rows.items()}
    assert cosines["dense-fp32"] == pytest.approx(1, abs=1e-6)
    assert rows["dense-fp32"]["scores"]["neighbours"] == 1
    assert 0.999 < cosines["dense-bf16"] < 1
    assert cosines["int8"] > cosines["hqq2+0.1"] > cosines["hqq2"]
    assert rows["int8"]["bytes"] < rows["dense-bf16"]["bytes"] < rows["dense-fp32"]["bytes"]
    table = capsys.readouterr().out.splitlines()
    assert "| spearman | " in table[0]
    assert len(table) == 2 + len(NAMES)
    assert "HQQ 2 bit, corrected" in (tmp_path / "picture.svg").read_text()

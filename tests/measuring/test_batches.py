"""Batches of every kind that users have, read once and checked once."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression.joint.disjoint import check_disjoint
from hf_lowrank.errors import DataError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.measuring.batches import checked_batches, follows_from, num_tokens, token_mask
from hf_lowrank.measuring.items import IGNORED
from hf_lowrank.measuring.losses import item_losses
from tests.measuring.moments import ALL, assert_equal_moments, collect_moments, linears
from tests.tiny_models import (
    sentence_batches,
    seq2seq_batches,
    tiny_bert_classifier,
    tiny_llama,
    tiny_t5,
    token_batches,
)

BATCHES = token_batches(4, 2, 16, padding=4)
ROWS = [
    {name: value[row].tolist() for name, value in batch.items()}
    for batch in BATCHES
    for row in range(2)
]
MODEL = tiny_llama()


def as_rows(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


def torch_dataset():
    dataset = Dataset.from_list(ROWS)
    dataset.set_format("torch")
    return dataset


WAYS = {
    "list": lambda: BATCHES,
    "generator": lambda: (batch for batch in BATCHES),
    "loader": lambda: DataLoader(torch_dataset(), batch_size=2),
    "shuffling loader": lambda: DataLoader(torch_dataset(), batch_size=2, shuffle=True),
    "dataset of rows": lambda: Dataset.from_list(ROWS),
    "torch dataset": torch_dataset,
    "batch encodings": lambda: [BatchEncoding(dict(batch)) for batch in BATCHES],
    "lists": lambda: [{k: v.tolist() for k, v in batch.items()} for batch in BATCHES],
    "rows of lists": lambda: ROWS,
    "arrays": lambda: [{k: v.numpy().astype("uint16") for k, v in b.items()} for b in BATCHES],
    "int32": lambda: [{k: v.int() for k, v in batch.items()} for batch in BATCHES],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_hand_over_batches_gives_the_same_tensors(way):
    torch.manual_seed(0)
    found = checked_batches(WAYS[way](), "calibration", MODEL)
    assert all(type(batch) is dict for batch in found)
    assert {tensor.dtype for batch in found for tensor in batch.values()} == {torch.int64}
    rows, wanted = as_rows(found), as_rows(BATCHES)
    if "shuffling" in way:
        assert not torch.equal(rows, wanted)
        rows, wanted = (tensor[tensor[:, 0].argsort()] for tensor in (rows, wanted))
    assert torch.equal(rows, wanted)


def test_before_and_after_are_paired_by_item_although_the_loader_shuffles():
    errors = []
    for evaluation in (BATCHES, WAYS["shuffling loader"]()):
        config = LowRankConfig(param_ratio=0.7)
        report = compress(tiny_llama(), config, BATCHES[:2], evaluation, progress=False)
        errors.append(report.evaluation.standard_error)
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_a_generator_serves_calibration_and_held_out_data():
    reports = [
        compress(
            tiny_llama(),
            LowRankConfig(loss_tolerance=0.5),
            batches,
            iter(BATCHES),
            progress=False,
        )
        for batches in (BATCHES, iter(BATCHES))
    ]
    assert reports[0].ranks == reports[1].ranks
    assert reports[0].evaluation == reports[1].evaluation


def test_what_is_handed_over_is_left_alone():
    before = copy.deepcopy(ROWS)
    checked_batches(ROWS, "calibration", MODEL)
    assert before == ROWS


def test_numbers_keep_their_values_and_gradients_stay_outside():
    values = torch.randn(2, 3, requires_grad=True)
    batch = {"x": values, "flags": [[True], [False]], "y": np.array([0.5, 2.0]), "z": [1.5, 2]}
    (found,) = checked_batches([batch], "calibration", torch.nn.Linear(3, 3), own_loss=False)
    assert not found["x"].requires_grad
    assert torch.equal(found["x"], values)
    assert found["flags"].dtype == torch.bool
    assert found["y"].tolist() == [0.5, 2.0]
    assert found["z"].tolist() == [1.5, 2.0]


TOKENS = BATCHES[0]["input_ids"]
EMBEDDED = torch.zeros(2, 16, 32)
REFUSED = {
    "a string": ("text", "calibration: expected a list of batches, .* got one str"),
    "one batch": (BATCHES[0], "calibration: expected a list of batches, .* got one dict"),
    "one encoding": (BatchEncoding(dict(BATCHES[0])), "got one BatchEncoding"),
    "one tensor": (TOKENS, "expected a list of batches, .* got one Tensor"),
    "a number": (3, "expected a list of batches, .* got one int"),
    "tensors": (
        [TOKENS],
        "calibration, batch 0: a batch is a dict of tensors by name; got a Tensor",
    ),
    "tuples": ([BATCHES[0], (TOKENS,)], "batch 1: a batch is a dict .* got a tuple"),
    "text": ([{"input_ids": TOKENS, "text": ["a", "b"]}], "batch 0: 'text', row 0, holds text; "),
    "one text": ([{"text": "words"}], "batch 0: 'text' holds text; tokenize it"),
    "array of text": ([{"text": np.array(["a", "b"])}], "'text', row 0, holds text; tokenize it"),
    "null": ([{"input_ids": TOKENS, "labels": None}], "batch 0: 'labels' is null; leave the row"),
    "null row": ([{"input_ids": [[1, 2], None]}], "'input_ids', row 1, is null; leave the row"),
    "null token": ([{"input_ids": [[1, 2], [3, None]]}], "'input_ids', row 1, is null"),
    "ragged": ([{"input_ids": [[1, 2], [3]]}], "'input_ids' makes no tensor .* pad its rows"),
    "list of tensors": (
        [{"input_ids": [TOKENS[0], TOKENS[1]]}],
        r"'input_ids', row 0, holds a Tensor; pass one tensor of shape \(batch, ...\)",
    ),
    "float8": (
        [{"inputs_embeds": EMBEDDED.to(torch.float8_e4m3fn), "labels": TOKENS}],
        "'inputs_embeds' holds torch.float8_e4m3fn, which no layer reads; convert it",
    ),
    "sparse": ([{"input_ids": TOKENS.to_sparse()}], "is a torch.sparse_coo tensor on cpu"),
    "meta": ([{"input_ids": TOKENS.to("meta")}], "is a torch.strided tensor on meta; pass its"),
    "no tensor": ([BATCHES[0], {}], r"batch 1 is empty \(no tensor\); leave it out"),
    "no item": ([{"input_ids": TOKENS[:0]}], r"batch 0 is empty \(input_ids\); leave it out"),
    "no token": ([{"input_ids": TOKENS[:, :0]}], r"batch 0 is empty \(input_ids\)"),
    "one number": ([{"input_ids": TOKENS, "weight": 2.0}], "'weight' is a single number; pass one"),
    "sizes": (
        [{"input_ids": TOKENS, "labels": TOKENS[:1]}],
        "different numbers of items: {'input_ids': 2, 'labels': 1}",
    ),
    "both": (
        [{"input_ids": TOKENS, "inputs_embeds": EMBEDDED}],
        "has both input_ids and inputs_emb",
    ),
    "no labels": (
        [{"inputs_embeds": EMBEDDED}],
        "has inputs_embeds and no labels, .* add the token",
    ),
    "vocabulary": ([{"input_ids": [[1, 2], [3, 96]]}], "row 1: token id 96 is outside .* of 96"),
    "negative": ([{"input_ids": [[1, -1]]}], "row 0: token id -1 is outside the model's vocab"),
    "short mask": (
        [{"input_ids": TOKENS, "attention_mask": torch.ones(2, 15)}],
        r"attention_mask has shape \(2, 15\); tokens of shape \(2, 16\) need \(2, 16\), or",
    ),
    "3-D mask": (
        [{"input_ids": TOKENS, "attention_mask": torch.ones(2, 16, 16)}],
        r"attention_mask has shape \(2, 16, 16\); tokens",
    ),
    "integer 4-D mask": (
        [{"input_ids": TOKENS, "attention_mask": torch.ones(2, 1, 16, 16, dtype=torch.long)}],
        "a 4-D attention_mask is boolean, or floats .* got torch.int64",
    ),
    "positive 4-D mask": (
        [{"input_ids": TOKENS, "attention_mask": torch.ones(2, 1, 16, 16)}],
        "a 4-D attention_mask of floats is added to the scores, .* got 1.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_batch_is_refused_with_its_place(name):
    batches, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as refusal:
        checked_batches(batches, "calibration", MODEL)
    assert "\n" not in str(refusal.value)


def test_a_model_without_an_embedding_of_tokens_takes_any_token(monkeypatch):
    """CANINE hashes its tokens, and transformers raises where it has no embedding to give."""

    def no_embedding():
        raise NotImplementedError("not auto-handled")

    model = tiny_llama()
    monkeypatch.setattr(model, "get_input_embeddings", no_embedding)
    (found,) = checked_batches([{"input_ids": [[1, 96_000]]}], "calibration", model)
    assert found["input_ids"].tolist() == [[1, 96_000]]


@pytest.mark.parametrize("role", ["calibration", "held_out", "evaluation"])
def test_every_set_is_checked_before_any_work(role):
    model = tiny_llama()
    calls = []
    model.register_forward_hook(lambda *call: calls.append(1))
    sets = {"calibration": BATCHES, role: [*BATCHES, {"text": ["a"]}]}
    with pytest.raises(DataError, match=re.escape(f"{role}, batch 4: 'text', row 0, holds text")):
        compress(model, LowRankConfig(param_ratio=0.7), **sets, progress=False)
    assert not calls


@pytest.mark.parametrize("role", ["held_out", "evaluation"])
def test_a_loss_that_cannot_be_known_is_refused_before_any_work(role, monkeypatch):
    monkeypatch.setattr(
        "hf_lowrank.compression.application.analyze", lambda *a, **k: pytest.fail("worked")
    )
    sets = {"calibration": sentence_batches(2), role: token_batches(1)}
    with pytest.raises(DataError, match="The batches have no 'labels', which BertForSequenceClass"):
        compress(tiny_bert_classifier(), LowRankConfig(param_ratio=0.7), **sets, progress=False)


def causal_mask(lengths):
    """A mask of sequences packed into one row of 16, padded at the end: (16, 16) booleans."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        mask[part, part] = torch.ones(length, length, dtype=torch.bool).tril()
        start += length
    return mask


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def packed_batch(form):
    """Two packed sequences and padding after them; one padded sequence of 12."""
    mask = torch.stack([causal_mask([6, 7]), causal_mask([12])])[:, None]
    tokens = token_batches(1, 2, 16, seed=3)[0]["input_ids"]
    position_ids = torch.stack(
        [torch.tensor([*range(6), *range(7), 0, 0, 0]), torch.arange(16)],
    )
    return {
        "input_ids": tokens,
        "attention_mask": mask if form == "booleans" else additive(mask),
        "position_ids": position_ids,
    }


def separate_sequences():
    """The same sequences, each alone."""
    tokens = packed_batch("booleans")["input_ids"]
    return [
        {"input_ids": tokens[:1, :6]},
        {"input_ids": tokens[:1, 6:13]},
        {"input_ids": tokens[1:, :12]},
    ]


@pytest.mark.parametrize("form", ["booleans", "floats"])
def test_packed_sequences_under_a_4d_mask_are_what_they_are_alone(form):
    model = tiny_llama()
    (batch,) = checked_batches([packed_batch(form)], "calibration", model)
    assert token_mask(batch).sum(dim=1).tolist() == [13, 12]
    assert num_tokens(batch) == 25
    scored = follows_from(batch)
    assert scored.sum(dim=1).tolist() == [5 + 6, 11]
    assert not scored[0, 5]  # the first token of the second sequence follows nothing
    with torch.no_grad():
        found = item_losses(model, batch)
        alone = [item_losses(model, each) for each in separate_sequences()]
    assert found.counts.tolist() == [11, 11]
    sums = torch.cat([each.sums for each in alone])
    torch.testing.assert_close(found.sums, torch.stack([sums[0] + sums[1], sums[2]]))


def test_moments_under_a_4d_mask_are_those_of_the_sequences_alone():
    model = tiny_llama()
    found, wanted = (
        collect_moments(model, linears(model), batches, frozenset({"input", "output", "gradient"}))
        for batches in ([packed_batch("floats")], separate_sequences())
    )
    for name, moment in found.items():
        assert (moment.tokens, moment.losses) == (25, 22)
        other = wanted[name]
        for one, two in (
            (moment.input.matrix, other.input.matrix),
            (moment.output.matrix, other.output.matrix),
            (moment.gradient, other.gradient),
        ):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max())), name


def test_one_mask_and_one_row_of_positions_may_stand_for_all_items():
    mask = additive(torch.ones(16, 16, dtype=torch.bool).tril())[None, None]
    tokens = token_batches(1, 3, 16)[0]["input_ids"]
    shared = {"input_ids": tokens, "attention_mask": mask, "position_ids": torch.arange(16)[None]}
    (batch,) = checked_batches([shared], "evaluation", MODEL)
    assert batch["attention_mask"].shape == (3, 1, 16, 16)
    assert num_tokens(batch) == 48
    wanted = item_losses(MODEL, {"input_ids": tokens})
    torch.testing.assert_close(item_losses(MODEL, batch).sums, wanted.sums)


def test_sets_under_4d_masks_are_compared_without_their_padding():
    batch = packed_batch("booleans")
    other = {"input_ids": batch["input_ids"][1:, :12]}
    with pytest.raises(DataError, match="Item 0 of the second set is also in the first set"):
        check_disjoint(first=[batch], second=[other])


def embedded(batch):
    """The batch by embeddings, with labels as `input_ids` and a mask imply them."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    with torch.no_grad():
        vectors = MODEL.get_input_embeddings()(batch["input_ids"])
    return {"inputs_embeds": vectors, "attention_mask": batch["attention_mask"], "labels": labels}


def test_embeddings_with_labels_are_compressed_as_their_tokens_are():
    reports = [
        compress(
            tiny_llama(),
            LowRankConfig(param_ratio=0.7, measured_prices=True),
            batches[:3],
            batches[3:],
            held_out=batches[2:3],
            recover_steps=2,
            progress=False,
        )
        for batches in (BATCHES, [embedded(batch) for batch in BATCHES])
    ]
    tokens, vectors = reports
    assert vectors.ranks == tokens.ranks
    assert vectors.data.calibration_tokens == tokens.data.calibration_tokens == 3 * 28
    assert vectors.evaluation.tokens == tokens.evaluation.tokens
    for field in ("loss_before", "loss_after", "standard_error"):
        found, wanted = (getattr(report.evaluation, field) for report in reports)
        assert found == pytest.approx(wanted, rel=1e-4), field


def test_embeddings_of_an_encoder_keep_its_positions_from_the_decoders():
    model = tiny_t5()
    (batch,) = seq2seq_batches(1)
    batch["labels"] = F.pad(batch["labels"], (0, 6), value=IGNORED)  # as long as the input
    vectors = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
        "labels": batch["labels"],
    }
    tokens = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    found, wanted = (
        collect_moments(model, linears(model), checked_batches([each], "calibration", model), ALL)
        for each in (vectors, tokens)
    )
    counts = {name: moment.tokens for name, moment in found.items()}
    assert counts["encoder.block.0.layer.0.SelfAttention.q"] == 32
    assert counts["decoder.block.0.layer.0.SelfAttention.q"] == 20
    assert counts == {name: moment.tokens for name, moment in wanted.items()}
    assert_equal_moments(found, wanted)


def test_losses_of_checked_batches_are_those_of_the_model():
    batches = checked_batches(Dataset.from_list(ROWS), "evaluation", MODEL)
    measured = measure_loss(MODEL, batches)
    total = sum(float(item_losses(MODEL, batch).sums.detach().sum()) for batch in BATCHES)
    assert measured.positions == 4 * (15 + 11)
    assert measured.mean == pytest.approx(total / measured.positions, rel=1e-5)

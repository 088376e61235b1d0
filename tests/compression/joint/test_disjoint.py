"""The data discipline: no item stands in two of the sets."""

import pytest
import torch

from hf_lowrank import LowRankConfig
from hf_lowrank.compression.joint.disjoint import check_disjoint
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.errors import DataError
from tests.tiny_models import num_lowrank, tiny_llama


def test_disjoint_sets_pass(text):
    check_disjoint(gradient=text[:4], acceptance=text[4:8], reported=None)


def test_an_item_in_two_sets_is_refused(text):
    shared = {name: tensor[2:] for name, tensor in text[1].items()}
    message = "^Item 4 of the reported set is also in the gradient set; the gradient, acc"
    with pytest.raises(DataError, match=message):
        check_disjoint(gradient=text[:4], acceptance=text[4:8], reported=[text[9], shared])


def test_overlapping_windows_of_a_text_are_refused():
    tokens = torch.randint(3, 90, (1, 300), generator=torch.Generator().manual_seed(0))
    first, apart = {"input_ids": tokens[:, :128]}, {"input_ids": tokens[:, 128:256]}
    check_disjoint(gradient=[first], acceptance=[apart])
    with pytest.raises(DataError, match="must not overlap"):
        check_disjoint(gradient=[first], acceptance=[{"input_ids": tokens[:, 60:188]}])


def test_padding_and_labels_do_not_hide_the_same_sentence():
    one = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([0])}
    other = {
        "input_ids": torch.tensor([[0, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1]]),
        "labels": torch.tensor([1]),
    }
    with pytest.raises(DataError, match="must not overlap"):
        check_disjoint(gradient=[one], acceptance=[other])


def test_the_same_image_is_refused():
    images = torch.rand(4, 3, 2, 2)
    batch = {"images": images, "labels": torch.arange(4)}
    other = {"images": images[3:], "labels": torch.tensor([0])}
    check_disjoint(gradient=[batch], acceptance=[{"images": images + 1}])
    with pytest.raises(DataError, match="Item 0 of the acceptance set"):
        check_disjoint(gradient=[batch], acceptance=[other])


def test_overlap_is_refused_before_anything_else(text):
    model = tiny_llama()
    for sets in ((text[:2], text[1:3]), (text[:2], text[2:4], text[3:5])):
        with pytest.raises(DataError, match="must not overlap"):
            compress_jointly(model, LowRankConfig(param_ratio=0.6), *sets)
    assert num_lowrank(model) == 0

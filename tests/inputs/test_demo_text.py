"""The texts that come with installed packages, and their parts by role."""

import itertools
from pydoc_data.topics import topics

import pytest
import torch

from hf_lowrank.errors import DataError
from hf_lowrank.inputs import demo_text
from hf_lowrank.inputs.demo_text import BUILT_IN, DEMO_GRAPHS, DEMO_LICENSES, ROLES
from hf_lowrank.inputs.text import read_text, token_batches
from tests.inputs import Counting


def paragraphs(text: str) -> set[str]:
    """Paragraphs that say something, however they are indented."""
    found = {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}
    return {paragraph for paragraph in found if len(paragraph) >= 40}


@pytest.mark.parametrize("source", BUILT_IN)
@pytest.mark.parametrize(("role", "other"), list(itertools.combinations(ROLES, 2)))
def test_the_roles_of_a_built_in_text_share_no_paragraph(source: str, role: str, other: str):
    """Some topics repeat others: 'if' and 'else' are the same, 'compound' quotes both."""
    one, two = (paragraphs(read_text(source, name)) for name in (role, other))
    shared = one & two
    assert not shared, f"{len(shared)} of {len(two)} paragraphs of {other} are also for {role}"


@pytest.mark.parametrize("role", ROLES)
def test_the_built_in_texts_have_nothing_in_common(role: str):
    for one, other in itertools.combinations(BUILT_IN, 2):
        assert not paragraphs(read_text(one, role)) & paragraphs(read_text(other, role))


def test_the_other_built_in_texts_are_prose_and_long_enough():
    """A quarter of the calibration of the demo, and all of its foreign evaluation."""
    assert len(read_text(DEMO_GRAPHS, "calibration")) > 4 * 16 * 256
    assert len(read_text(DEMO_GRAPHS, "held_out")) > 4 * 8 * 256
    assert len(read_text(DEMO_LICENSES, "evaluation")) > 4 * 16 * 256  # fewer windows will do
    assert "shortest path" in read_text(DEMO_GRAPHS)
    assert "copyright" in read_text(DEMO_LICENSES).lower()


def test_built_in_texts_are_split_by_role_already():
    settings = {"sequences": 3, "sequence_length": 64, "role": "held_out"}
    whole = token_batches("demo", Counting(), **settings)
    (batch,) = token_batches("demo", Counting(), part=(0.75, 1.0), **settings)
    assert torch.equal(batch["input_ids"], whole[0]["input_ids"])


def test_a_built_in_text_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    for read in BUILT_IN.values():
        read.cache_clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(demo_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="demo-graphs: needs networkx, which comes with torch"):
        read_text(DEMO_GRAPHS)
    monkeypatch.setattr(demo_text, "_LICENSED", ("no-such-package",))
    with pytest.raises(DataError, match="demo-licenses: no dependency is installed with its"):
        read_text(DEMO_LICENSES)


@pytest.mark.parametrize(
    ("role", "tokens"),
    [("calibration", 64 * 256), ("held_out", 32 * 256), ("evaluation", 32 * 256)],
)
def test_every_role_of_the_demo_has_enough_text_for_the_defaults(role: str, tokens: int):
    characters_per_token = 4
    assert len(read_text("demo", role)) > characters_per_token * tokens


def test_the_demo_text_comes_from_the_help_topics():
    everything = paragraphs("\n\n".join(topics.values()))
    for role in ROLES:
        found = paragraphs(read_text("demo", role))
        assert len(found - everything) <= 0.05 * len(found)


def test_most_of_the_demo_is_for_calibration():
    sizes = {role: len(read_text("demo", role)) for role in ROLES}
    assert max(sizes, key=lambda role: sizes[role]) == "calibration"

"""Made-up sentences with named spans, in columns: a span is told by its words alone."""

from pathlib import Path

import torch

from tests.scripts import WORDS

TAGS = {"w80": "B-PER", "w81": "I-PER", "w82": "B-LOC"}


def sentences(count: int, seed: int = 0) -> list[list[str]]:
    """Six to nine words each, with a span of two words in every one, and one of one in half."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        words = [WORDS[i] for i in torch.randint(80, (5 + number % 3,), generator=generator)]
        place = int(torch.randint(len(words), (1,), generator=generator))
        words[place:place] = ["w80", "w81"]
        found.append([*words, "w82"] if number % 2 else words)
    return found


def write_conll(path: Path, count: int, seed: int = 0) -> Path:
    """A file in the four columns of CoNLL-2003: word, part of speech, chunk, tag."""
    blocks = ["-DOCSTART- -X- -X- O\n"]
    for words in sentences(count, seed):
        blocks.append("".join(f"{word} NN I-NP {TAGS.get(word, 'O')}\n" for word in words))
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path

"""Named spans in tags of words, and their F1: what seqeval computes.

A tag is `O`, outside of all spans, or a letter and a type, as `B-PER`: `B` begins a span, `I` goes
on with it, `E` ends it, and `S` is one by itself. All that is in use is read: IOB1, where `B`
stands only between two spans of a type, IOB2, and IOBES.
"""

from __future__ import annotations

from collections.abc import Sequence

# First word, the word after the last one, type.
Span = tuple[int, int, str]


def spans(tags: Sequence[str]) -> list[Span]:
    """The spans of a sentence, in its order.

    A span begins with `B` or `S`, and with `I` or `E` where the word before is outside, ends a
    span, or is of another type.
    """
    found: list[Span] = []
    last, kind = "O", ""
    for place, tag in enumerate(tags):
        letter, _, name = tag.partition("-")
        if letter != "O":
            if letter in "BS" or last in "OES" or name != kind:
                found.append((place, place, name))
            found[-1] = (found[-1][0], place + 1, name)
        last, kind = letter, name
    return found


def iob2(tags: Sequence[str]) -> list[str]:
    """The same spans with tags in which each begins with `B` and goes on with `I`."""
    found = ["O"] * len(tags)
    for start, end, kind in spans(tags):
        found[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return found


def span_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """F1, precision and recall of whole spans over all sentences, and accuracy of tags, in [0, 1].

    A span counts as found if its words and its type are right. Without a span, a share of spans
    is 0.

    Args:
        predictions: Tags of each sentence.
        references: The gold tags, as many.
    """
    pairs = list(zip(predictions, references, strict=True))
    found, wanted = (
        {(number, *span) for number, tags in enumerate(side) for span in spans(tags)}
        for side in (predictions, references)
    )
    right, both = len(found & wanted), len(found) + len(wanted)
    same = [a == b for one, other in pairs for a, b in zip(one, other, strict=True)]
    return {
        "f1": 2 * right / both if both else 0.0,
        "precision": right / len(found) if found else 0.0,
        "recall": right / len(wanted) if wanted else 0.0,
        "accuracy": sum(same) / len(same),
    }

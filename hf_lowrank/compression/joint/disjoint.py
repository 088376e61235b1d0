"""Whether sets of batches share items. Nothing may be judged on what it was fitted to.

See docs/methods.md, 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.digest import update_digest
from hf_lowrank.measuring.batches import token_mask
from hf_lowrank.measuring.items import Batch

RUN = 64
_NO_CONTENT = ("labels", "attention_mask", "token_type_ids", "position_ids")


def check_disjoint(**sets: Sequence[Batch] | None) -> None:
    """Refuses sets that share an item.

    Token sequences share something if they are equal without padding, or if any 64 tokens in a
    row are in both, as in windows of the same text that overlap. Other items (images) are
    shared if their tensors are equal. Labels do not count: the same text with another label is
    the same text.

    Args:
        **sets: Batches by the name of the set; None for a set that is not used.

    Raises:
        DataError: Two sets share an item.
    """
    owner: dict[bytes, str] = {}
    for name, batches in sets.items():
        own: dict[bytes, str] = {}
        for index, item in enumerate(_items(batches or [])):
            for content in _fingerprints(item):
                other = owner.get(content)
                if other is not None:
                    raise DataError(
                        f"Item {index} of the {name} set is also in the {other} set; the "
                        f"{', '.join(sets)} sets must not overlap."
                    )
                own[content] = name
        owner |= own


def _items(batches: Sequence[Batch]) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            item = {name: tensor[row] for name, tensor in batch.items()}
            mask = token_mask(batch)
            yield item if mask is None else item | {"attention_mask": mask[row]}


def _fingerprints(item: dict[str, torch.Tensor]) -> Iterator[bytes]:
    tokens = item.get("input_ids")
    if tokens is None:
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(set(item) - set(_NO_CONTENT)) or sorted(item):
            update_digest(digest, name, item[name])
        yield digest.digest()
        return
    if "attention_mask" in item:
        tokens = tokens[item["attention_mask"]]
    width = 8
    data = tokens.detach().cpu().to(torch.int64).contiguous().numpy().tobytes()
    for start in range(max(1, len(tokens) - RUN + 1)):
        part = data[start * width : (start + RUN) * width]
        yield hashlib.blake2b(part, digest_size=16).digest()

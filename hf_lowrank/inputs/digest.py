"""Hashes of tensors, for files that must not be read for others."""

from __future__ import annotations

import hashlib

import torch


def update_digest(digest: hashlib.blake2b, name: str, tensor: torch.Tensor) -> None:
    """Adds a tensor to a hash: name, dtype, shape and bytes."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    digest.update(flat.view(torch.uint8).numpy().tobytes())

"""Calibration text that a model writes itself, where its owner has none at hand.

Sampled at temperature 1, with nothing cut off, so that it is what the model takes text to be: its
next tokens are draws from its own predictions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.files import atomic_file
from hf_lowrank.inputs.digest import update_digest
from hf_lowrank.inputs.start_token import start_tokens
from hf_lowrank.measuring.progress import Progress

GENERATED = "generated"
_BATCH = 16


@dataclass(frozen=True)
class OwnText:
    """Writes windows of tokens.

    Attributes:
        model: A causal language model.
        tokenizer: Its tokenizer.
        seed: Seed of the draws.
        folder: Where windows are kept for another run, None for nowhere.
    """

    model: nn.Module
    tokenizer: Any
    seed: int = 0
    folder: Path | None = None

    def windows(self, count: int, length: int, role: str) -> torch.Tensor:
        """Windows of tokens; those of one role are drawn apart from those of another.

        Args:
            count: How many.
            length: Tokens in each, without a start token.
            role: What they are for.

        Returns:
            Ids, shape (count, length).

        Raises:
            DataError: The model can't write text.
            NumericalError: Its predictions are not finite.
        """
        if not getattr(self.model, "can_generate", lambda: False)():
            raise DataError(
                f"{type(self.model).__name__} writes no text; give a text in place of "
                f"{GENERATED!r}."
            )
        path = None if self.folder is None else self.folder / self._name(count, length, role)
        if path is not None and (known := _read(path, (count, length))) is not None:
            return known
        found = self._write(count, length, role)
        if path is not None:
            with atomic_file(path) as temporary:
                torch.save(found, temporary)
        return found

    def _name(self, count: int, length: int, role: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{count} {length} {role} {self.seed} {self._start()}".encode())
        for name, tensor in self.model.state_dict().items():
            update_digest(digest, name, tensor)
        return f"text-{digest.hexdigest()}.pt"

    def _start(self) -> list[int]:
        """What a text begins with: the start token, else the end of the text before."""
        one = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0]
        return start_tokens(self.tokenizer) or [next(each for each in one if each is not None)]

    @torch.no_grad()
    def _write(self, count: int, length: int, role: str) -> torch.Tensor:
        model: Any = self.model
        begin = torch.tensor(self._start(), device=next(model.parameters()).device)
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=length,  # a window is whole: no end of text before
            max_new_tokens=length,
            pad_token_id=next(
                each
                for each in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
                if each is not None
            ),
        )
        digest = hashlib.blake2b(f"{role} {self.seed}".encode(), digest_size=4).digest()
        found = []
        with torch.random.fork_rng(), Progress(f"write {role} text", count, "windows") as progress:
            torch.manual_seed(int.from_bytes(digest, "big"))
            for start in range(0, count, _BATCH):
                number = min(_BATCH, count - start)
                ids = begin.repeat(number, 1)
                try:
                    text = model.generate(
                        ids, attention_mask=torch.ones_like(ids), generation_config=settings
                    )
                except RuntimeError as error:
                    if "probability tensor" not in str(error):
                        raise
                    raise NumericalError(
                        f"The model's own predictions are no probabilities ({error}); load it "
                        "in float32."
                    ) from error
                found.append(text[:, len(begin) : len(begin) + length].cpu())
                progress.update(number)
        return torch.cat(found)


def _read(path: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    """What was written before, None where it is not there or damaged."""
    try:
        found = torch.load(path, weights_only=True)
    except Exception:  # written again
        return None
    is_whole = isinstance(found, torch.Tensor) and found.shape == shape
    return found if is_whole else None

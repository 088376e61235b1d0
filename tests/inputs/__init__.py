"""A tokenizer for texts of numbers."""

from typing import Any


class Counting:
    """A tokenizer whose tokens are the numbers in the text, any other word is 0."""

    bos_token_id = None
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        ids = [int(word) % 10_000 if word.isdigit() else 0 for word in text.split()]
        if settings["add_special_tokens"]:
            ids = [*self.start, *ids, *self.end]
        return {"input_ids": ids}

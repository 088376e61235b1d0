"""Batches of random tokens for any model of a task, and what it predicts on them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQUENCE_CLASSIFICATION": "AutoModelForSequenceClassification",
    "TOKEN_CLASSIFICATION": "AutoModelForTokenClassification",
    "QUESTION_ANSWERING": "AutoModelForQuestionAnswering",
    "MASKED_LM": "AutoModelForMaskedLM",
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "MULTIPLE_CHOICE": "AutoModelForMultipleChoice",
}
_ITEMS = 2
_LENGTH = 12
_SPECIAL = 5  # the first tokens, never drawn
_LAST = 90  # tokens after it may stand for images and the like


def random_batches(model: Any, task: str, number: int, seed: int = 0) -> list[dict[str, Any]]:  # noqa: ANN401
    """Batches of two items of 12 tokens with the labels of the task.

    Args:
        model: The model, whose vocabulary and forward arguments count.
        task: A key of `TASKS`.
        number: How many batches.
        seed: Seed of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_batch(model, task, generator) for _ in range(number)]


def _batch(model: Any, task: str, generator: torch.Generator) -> dict[str, Any]:  # noqa: ANN401
    config = model.config.get_text_config()
    last = min(_LAST, (getattr(config, "vocab_size", None) or _LAST) - 1)
    shape = (_ITEMS, 2, _LENGTH) if task == "MULTIPLE_CHOICE" else (_ITEMS, _LENGTH)
    tokens = torch.randint(_SPECIAL, last, shape, generator=generator)
    tokens[..., -1] = _end_token(model.config)
    if task in ("QUESTION_ANSWERING", "MULTIPLE_CHOICE") and hasattr(config, "sep_token_id"):
        tokens[..., [4, 5, -1]] = min(config.sep_token_id or 0, last)  # as around a question
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" not in accepted and "kwargs" not in accepted:
        del batch["attention_mask"]
    if "bbox" in accepted:
        batch["bbox"] = torch.zeros(*shape, getattr(model.config, "dim_bbox", 4)).long()
    return batch | _labels(model, task, tokens, generator)


def _end_token(config: Any) -> int:  # noqa: ANN401
    """Some classifiers read the state at the one end token of a text."""
    end = getattr(config.get_text_config(), "eos_token_id", None)
    return end if isinstance(end, int) else 2


def _labels(
    model: Any,  # noqa: ANN401
    task: str,
    tokens: torch.Tensor,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Random labels of a task; a causal language model's are its tokens."""
    if task == "CAUSAL_LM":
        return {}
    if task == "QUESTION_ANSWERING":
        start = torch.randint(0, _LENGTH // 2, (_ITEMS,), generator=generator)
        return {"start_positions": start, "end_positions": start + 2}
    if task in ("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        return {"labels": tokens.clone()}
    shape = tokens.shape if task == "TOKEN_CLASSIFICATION" else (_ITEMS,)
    classes = 2 if task == "MULTIPLE_CHOICE" else model.config.num_labels
    return {"labels": torch.randint(0, classes, shape, generator=generator)}


@torch.no_grad()
def predictions(model: Any, batch: dict[str, Any]) -> torch.Tensor:  # noqa: ANN401
    """All logits of a batch in one vector; the random state is the same at each call.

    Raises:
        ValueError: The model returns no logits.
    """
    torch.manual_seed(0)
    output = model(**batch, return_dict=True)
    found = [
        value.float().flatten()
        for name, value in output.items()
        if isinstance(value, torch.Tensor) and name.endswith("logits")
    ]
    if not found:
        raise ValueError(f"returns no logits but {', '.join(output)}")
    return torch.cat(found)


@torch.no_grad()
def three_tokens(model: Any, batch: dict[str, Any]) -> list[Any]:  # noqa: ANN401
    """What the model writes after a batch, greedily."""
    torch.manual_seed(0)
    given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    written = model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0)
    rows: list[Any] = written.tolist()
    return rows

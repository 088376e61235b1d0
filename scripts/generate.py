"""Continue a prompt with a compressed checkpoint, loaded by plain transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import hf_lowrank
from hf_lowrank.cli.arguments import parse_arguments, user_errors
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.inputs.sources import load_tokenizer
from hf_lowrank.inputs.start_token import encode_prompt


@dataclass
class GenerationArguments:
    """Arguments of this script."""

    model: str = option("outputs/demo", "Folder or Hub id of a compressed model.")
    prompt: str = option("In Python, a list is", "Text to continue.")
    repetition_penalty: float = option(1.3, "Above 1: words are repeated less.")
    max_new_tokens: int = option(40, "Tokens to add at most.")
    trust_remote_code: bool = option(
        False,
        "Run the Python code that comes with the tokenizer; only where you have read it and trust "
        "it. The model is of transformers' own classes and runs none.",
    )


def main() -> None:
    """Parses, loads, generates, prints."""
    args = parse_arguments(GenerationArguments, __doc__)
    with user_errors():
        if not args.prompt.strip() or args.max_new_tokens < 1:
            raise ConfigError("prompt must not be empty, and max_new_tokens must be at least 1.")
        model: Any = hf_lowrank.load(args.model)
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        ids = encode_prompt(tokenizer, args.prompt)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.max_new_tokens,
            repetition_penalty=args.repetition_penalty,
            do_sample=False,
        )
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

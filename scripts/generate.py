"""Continue a prompt with a compressed checkpoint, loaded by plain transformers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoTokenizer, HfArgumentParser

import hf_lowrank
from hf_lowrank.arguments import argument, user_errors


@dataclass
class GenerationArguments:
    """Arguments of this script."""

    model: str = argument("outputs/demo", "Folder or Hub id of a compressed model.")
    prompt: str = argument("In Python, a list is", "Text to continue.")
    max_new_tokens: int = argument(40, "Tokens to add at most.")


def main() -> None:
    """Parses, loads, generates, prints."""
    (args,) = HfArgumentParser(GenerationArguments).parse_args_into_dataclasses()
    with user_errors():
        model = hf_lowrank.load(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        inputs = tokenizer(args.prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

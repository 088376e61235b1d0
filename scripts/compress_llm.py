"""Compress a causal language model and save it for `from_pretrained`.

python scripts/compress_llm.py --model gpt2 --param_ratio 0.8 --output_dir gpt2-small
"""

from __future__ import annotations

from hf_lowrank.cli.arguments import (
    CompressionArguments,
    PublishingArguments,
    parse_several,
    user_errors,
)
from hf_lowrank.cli.compress_command import compress_causal_lm
from hf_lowrank.measuring.progress import working_on


def main() -> None:
    """Parses and runs."""
    with user_errors():
        args, publishing = parse_several((CompressionArguments, PublishingArguments), __doc__)
        with working_on(args.model):
            compress_causal_lm(args, publishing)


if __name__ == "__main__":
    main()

"""The texts of a run by what they are for, as the command line asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.cli.arguments import READ_AS, CompressionArguments
from hf_lowrank.inputs.demo_text import BUILT_IN
from hf_lowrank.inputs.own_text import OwnText
from hf_lowrank.inputs.text import token_batches


def batches_by_role(
    args: CompressionArguments,
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Batches by role; held-out text is the end of the calibration text."""
    folder = Path(args.cache_dir) if args.cache_dir else None
    own_text = OwnText(model, tokenizer, args.seed, folder)
    wanted = args.text_roles()
    parts = {}
    if "held_out" in wanted:
        parts = {"calibration": (0.0, 0.75), "held_out": (0.75, 1.0)}
    return {
        role: token_batches(
            args.text_source(role),
            tokenizer,
            sequences=sequences,
            sequence_length=args.sequence_length,
            role=READ_AS.get(role, role),
            part=parts.get(role, (0.0, 1.0)),
            batch_size=args.batch_size,
            own_text=own_text,
            at_most=role == "foreign" and args.text_source(role) in BUILT_IN,
        )
        for role, sequences in wanted.items()
    }

"""The texts of a run by what they are for, as the command line asks for them."""

from __future__ import annotations

from typing import Any

from hf_lowrank.cli.arguments import READ_AS, CompressionArguments
from hf_lowrank.inputs.demo_text import BUILT_IN
from hf_lowrank.inputs.text import token_batches


def batches_by_role(args: CompressionArguments, tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401
    """Batches by role; held-out text is the end of the calibration text."""
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
            at_most=role == "foreign" and args.text_source(role) in BUILT_IN,
        )
        for role, sequences in wanted.items()
    }

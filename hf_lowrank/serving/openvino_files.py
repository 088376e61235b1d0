"""Models as OpenVINO files, by optimum-intel: every layer as it is, two factors as two products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_openvino(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    folder: Path,
    task: str,
) -> None:
    """Writes a model and its tokenizer for `optimum.intel` and `openvino_genai`.

    Args:
        model: Of transformers; the numbers are stored in its data type.
        tokenizer: Its tokenizer, written for transformers, and for OpenVINO where it can be.
        folder: Where to.
        task: optimum's name, such as "text-generation-with-past".
    """
    from optimum.exporters.openvino import export_from_model
    from optimum.exporters.openvino.__main__ import maybe_convert_tokenizers

    is_short = model.dtype in (torch.float16, torch.bfloat16)
    export_from_model(
        model, folder, task=task, preprocessors=[tokenizer], patch_16bit_model=is_short
    )
    maybe_convert_tokenizers("transformers", folder, model, [tokenizer], task=task)

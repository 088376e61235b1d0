"""Plugin for vLLM, which finds it by the entry point `vllm.general_plugins` of this package."""

from __future__ import annotations


def register() -> None:
    """Makes the quantization method "lowrank" known to vLLM; may be called again."""
    import hf_lowrank.serving.vllm.vllm_config  # noqa: F401 (registers; needs vLLM, this file not)

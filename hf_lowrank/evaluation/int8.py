"""Weight-only int8 on top of the factors, by torchao, for inference."""

from __future__ import annotations

from torch import nn

from hf_lowrank.format.torchao_weights import check_torchao


def quantize_int8_(model: nn.Module) -> None:
    """Weights of all linear layers but the head to int8, one scale for each row; in place.

    The factors of a compressed model are linear layers like any other. Activations stay as they
    are. For inference only; quantize after loading, a quantized model is not saved as a low-rank
    checkpoint.

    Args:
        model: A transformers model, dense or compressed.

    Raises:
        ConfigError: torchao is not installed.
    """
    check_torchao("int8")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, nn.Linear) and module is not head,
    )

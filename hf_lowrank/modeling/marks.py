"""What says on a model that it is compressed: its config, and how it is saved."""

from __future__ import annotations

from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.format.fused_experts import experts_shape, small_experts
from hf_lowrank.format.layout import EXPERTS_VERSION, FORMAT_VERSION
from hf_lowrank.format.marking import mark_as_lowrank_, unmark_as_lowrank_
from hf_lowrank.format.quantizer import LowRankQuantizer
from hf_lowrank.format.rebuild import narrowed_layers
from hf_lowrank.format.torchao_weights import quantized_settings


def attach_config_(model: nn.Module, config: LowRankConfig | None) -> None:
    """Marks a model's config with what was decided, so that it is saved as low-rank.

    Which layers are narrowed or quantized, and what is left of experts, is read off the model. With
    None the marks are removed again. Models without a transformers config are left alone.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return
    if config is None:
        unmark_as_lowrank_(model)
    else:
        layers = narrowed_layers(model)
        left = {
            n: s.size.to_json() for n, m in small_experts(model).items() if (s := experts_shape(m))
        }
        config = config.replace(
            narrowed={n: [*m.weight.shape] for n, m in layers.items()} or None,
            quantized=quantized_settings(model),
            experts=left or None,
            format_version=EXPERTS_VERSION if left else FORMAT_VERSION,
        )
        mark_as_lowrank_(model, LowRankQuantizer(config, pre_quantized=True))

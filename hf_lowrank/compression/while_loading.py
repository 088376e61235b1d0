"""Compression of a dense checkpoint while `from_pretrained` loads it.

Importing this module registers the quantization method "lowrank" with transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.application import quantize_
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.goals import check_goal
from hf_lowrank.compression.options import Run, RunOptions, run_targets
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.errors import CheckpointError, ConfigError
from hf_lowrank.format.layout import QUANT_METHOD
from hf_lowrank.format.quantizer import LowRankQuantizer
from hf_lowrank.format.torchao_weights import quantized_settings
from hf_lowrank.modeling.surgery import factorize_
from hf_lowrank.modeling.weight_precision import check_quantizable


class LowRankHfQuantizer(LowRankQuantizer):
    """Rebuilds low-rank checkpoints, and compresses dense ones while they are loaded.

    `from_pretrained("gpt2", quantization_config=LowRankConfig(param_ratio=0.8, metric="plain"))`
    has no data, so the metric must be one that needs none, and the goal a size or given `ranks`.
    """

    requires_calibration = False
    quantization_config: LowRankConfig  # type: ignore[assignment]

    def __init__(self, quantization_config: LowRankConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config = quantization_config
        if self.pre_quantized:
            if config.ranks is None:
                raise CheckpointError(
                    "config.json names quant_method 'lowrank' but holds no ranks; the checkpoint "
                    "is incomplete."
                )
        elif METRICS[config.metric].needs:
            raise ConfigError(
                f"from_pretrained has no calibration data, which metric {config.metric!r} needs; "
                "use LowRankConfig(metric='plain', param_ratio=...), or load the dense model and "
                "call hf_lowrank.compress."
            )
        elif config.narrowed:
            raise ConfigError(
                "from_pretrained has no calibration data, which narrowed layers need; load the "
                "dense model and call hf_lowrank.compress."
            )
        elif config.ranks is None and config.goal in ("loss_tolerance", "megabytes"):
            raise ConfigError(
                "from_pretrained can't measure a loss; give LowRankConfig a param_ratio or a rank."
            )

    def _process_model_after_weight_loading(
        self,
        model: nn.Module,
        **kwargs: Any,
    ) -> nn.Module:
        if not self.pre_quantized:
            self.quantization_config = _compress_without_data(model, self.quantization_config)
            self.pre_quantized = True
        return super()._process_model_after_weight_loading(model, **kwargs)


def _compress_without_data(model: nn.Module, config: LowRankConfig) -> LowRankConfig:
    quiet = Run(options=RunOptions(progress=False))
    targets, _ = run_targets(model, config, quiet)
    check_goal(targets, config)
    check_quantizable(targets, config.weights)
    decision = decide(model, analyze(model, targets, config, quiet), quiet)
    plan = decision.plan
    factorize_(model, decision.analysis.factors, plan)
    quantize_(model, targets, config, quiet)
    return config.replace(
        ranks=dict(plan.ranks),
        narrowed=None,
        quantized=quantized_settings(model),
        form=plan.form,
    )


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LowRankConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LowRankHfQuantizer

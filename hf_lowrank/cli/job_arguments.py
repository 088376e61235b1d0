"""What all commands that compress a model are told, beside their goals and texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_lowrank.compression.options import run_option
from hf_lowrank.config import LowRankConfig, config_option, option
from hf_lowrank.errors import ConfigError
from hf_lowrank.inputs.sources import TRUST_HELP
from hf_lowrank.value_checks import check_count


@dataclass
class JobArguments:
    """Arguments that these commands have in common; a command adds its goals and its texts."""

    model: str = option("", "Dense model.")
    param_ratio: list[float] | None = config_option("param_ratio")
    metric: str = config_option("metric")
    rule: str | None = config_option("rule")
    weights: str | None = config_option("weights")
    target_modules: list[str] | None = config_option("target_modules")
    exclude_modules: list[str] | None = config_option("exclude_modules")
    form: str | None = config_option("form")
    dtype: str = option("auto", "auto (as stored), float32, bfloat16 or float16.")
    device: str = option("cpu", "Device of the model.")
    trust_remote_code: bool = option(False, TRUST_HELP)
    output_dir: str | None = option(None, "Folder for the compressed model and report.json.")
    overwrite_output_dir: bool = option(False, "Replace an output folder that is not empty.")
    html_report: bool = option(
        True, "Write report.html, with figures, into the output folder; needs matplotlib."
    )
    seed: int = config_option("seed")
    cache_dir: str | None = run_option("cache_dir")
    recover_steps: int = run_option("recover_steps")
    recover: str | None = run_option("recover")
    speed: bool = run_option("speed", default=True)

    def check_numbers(self, least: Mapping[str, int]) -> None:
        """Refuses sizes and counts out of range.

        Args:
            least: The least value of each count, by its name.

        Raises:
            ConfigError: With the first of them.
        """
        ratios = self.param_ratio or []
        for ratio in ratios[1:]:
            LowRankConfig(param_ratio=ratio)
        if len(set(ratios)) < len(ratios):
            raise ConfigError(f"param_ratio names a size twice: {' '.join(map(str, ratios))}.")
        for name, limit in least.items():
            check_count(name, getattr(self, name), limit)

    def sizes(self) -> list[str]:
        """Name of each size's folder below the output folder; "" for the folder itself."""
        ratios = [str(ratio) for ratio in self.param_ratio or []]
        return ratios if len(ratios) > 1 else [""]

    def text_roles(self) -> dict[str, int]:
        """How much text is wanted, by role."""
        raise NotImplementedError

    def text_source(self, role: str) -> str:
        """Where the text of a role comes from."""
        raise NotImplementedError

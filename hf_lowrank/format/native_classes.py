"""Classes that `auto_map` names: they hand over to transformers' own auto classes."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto

REMOTE_MODULE = "modeling_lowrank"
# Not `dir(transformers)`: that alone takes a second.
_AUTO_CLASSES = tuple(
    name for name in vars(modeling_auto) if name == "AutoModel" or name.startswith("AutoModelFor")
)


def auto_map(config: Any) -> dict[str, str]:  # noqa: ANN401
    """`auto_map` entries for every auto class that has a native model for this config."""
    names = [
        name
        for name in _AUTO_CLASSES
        if type(config) in getattr(getattr(transformers, name), "_model_mapping", ())
    ]
    return {name: f"{REMOTE_MODULE}.LowRank{name}" for name in names}


def foreign_entries(config: Any) -> dict[str, str]:  # noqa: ANN401
    """`auto_map` entries that are not ours: the model has code of its own."""
    known = getattr(config, "auto_map", None) or {}
    return {name: value for name, value in known.items() if REMOTE_MODULE not in str(value)}


def name_as_in_4_(config: Any) -> None:  # noqa: ANN401
    """Gives a config the rotary settings under the names that transformers 4 reads, in place.

    Version 5 writes them as `rope_parameters`, which version 4 ignores without a word.

    Raises:
        ValueError: They differ between layers, for which version 4 has no common names.
    """
    for part in (config, config.get_text_config()):
        settings = dict(getattr(part, "rope_parameters", None) or {})
        if any(isinstance(value, dict) for value in settings.values()):
            raise ValueError(
                f"config.json has rope_parameters for each kind of layer ({', '.join(settings)}), "
                f"which transformers {transformers.__version__} can't read; install version 5."
            )
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in settings:
                setattr(part, name, settings[name])
        if settings:
            part.rope_scaling = settings if settings["rope_type"] != "default" else None


class _NativeLoader:
    """Stands behind an `auto_map` entry and hands over to the native auto class."""

    auto_class = ""

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> None:
        """Called by transformers on remote classes; nothing to do for native ones."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> nn.Module:
        """Loads the checkpoint with the native class, now that "lowrank" is registered."""
        kwargs["trust_remote_code"] = False
        if transformers.__version__.startswith("4."):
            name_as_in_4_(kwargs["config"])
        loader = getattr(transformers, cls.auto_class)
        model: nn.Module = loader.from_pretrained(path, *args, **kwargs)
        return model


for _name in _AUTO_CLASSES:
    globals()[f"LowRank{_name}"] = type(
        f"LowRank{_name}", (_NativeLoader,), {"auto_class": _name, "__module__": __name__}
    )

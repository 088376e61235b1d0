"""A checkpoint's tensors, read into a part of a model on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from hf_lowrank.format.strict import names_in_model
from hf_lowrank.inputs.sources import refuse_wrong_keys


class CheckpointTensors:
    """Where each tensor of a model lies, by the names that they have in the model.

    Args:
        model: A transformers model on the meta device.
        files: Its safetensors files.
        device: Where tensors are read to.
    """

    def __init__(self, model: Any, files: Sequence[Path], device: torch.device) -> None:  # noqa: ANN401
        self.model, self.files, self.device = model, list(files), device
        self.conversions: list[Any] = get_model_conversion_mapping(model)
        self.places: dict[str, tuple[str, Path]] = {}
        self.converts = False
        for path in files:
            with safe_open(path, framework="pt") as file:
                for key, name, is_converted in names_in_model(model, file.keys()):
                    self.converts |= is_converted
                    self.places[key] = (name, path)

    def check(self, source: str) -> None:
        """Refuses a checkpoint that lacks weights of the model, or holds more than the model has.

        What transformers splits or joins while loading is checked where it is read.

        Raises:
            DataError: With the first tensor.
        """
        if self.converts:
            return
        state, found = self.model.state_dict(), {name for name, _ in self.places.values()}
        tied = set(getattr(self.model, "all_tied_weights_keys", ()))
        missing = [name for name in state if name not in found and name not in tied]
        left_over = [name for name in found if name not in state]
        info = {"missing_keys": missing, "unexpected_keys": left_over}
        refuse_wrong_keys(source, self.model, info)

    def read(self, wanted: Callable[[str], bool]) -> None:
        """Reads the tensors whose names are wanted into the model, in place.

        Shards are mapped into memory for the time of the call alone.
        """
        config = LoadStateDictConfig(
            device_map={"": self.device}, dtype=self.model.dtype, weight_mapping=self.conversions
        )
        with ExitStack() as stack, _quiet():
            opened: dict[Path, Any] = {}
            slices = {}
            for key, (name, path) in self.places.items():
                if wanted(name):
                    if path not in opened:
                        opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                    slices[key] = opened[path].get_slice(key)
            convert_and_load_state_dict_in_model(
                model=self.model, state_dict=slices, load_config=config
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar for every block."""
    was_active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_active:
            logging.enable_progress_bar()

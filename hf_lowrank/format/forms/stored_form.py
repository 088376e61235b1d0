"""What a stored form has to tell, and the forms by name.

A new form is a new file in this folder: a `StoredForm` that is registered, and the
`CompressedLayer` that it builds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.errors import CheckpointError
from hf_lowrank.format.dense_linear import layer_options, linear_shape
from hf_lowrank.format.layout import Layout
from hf_lowrank.format.torchao_weights import stored_shapes


class CompressedLayer(nn.Module):
    """A layer in the place of a dense one that it can turn back into."""

    conv1d: bool  # whether that is a transformers `Conv1D`

    @property
    def form(self) -> str:
        """Name of its stored form."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The dense layer with the same output: `nn.Linear`, or `Conv1D` if it came from one."""
        raise NotImplementedError


class StoredForm(ABC):
    """One way in which a layer lies in a checkpoint.

    Attributes:
        name: Its name; `form` in config.json for the forms of `ranks`.
        listed_in: Field of config.json that maps its layers to their entries.
        entry: What such an entry is, in a word.
        content: What its tensors are, in a word.
        tensors: Their names below the layer's, without the bias.
    """

    name: ClassVar[str]
    listed_in: ClassVar[str] = "ranks"
    entry: ClassVar[str] = "rank"
    content: ClassVar[str] = "factors"
    tensors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def shapes(self, shape: tuple[int, int], entry: Any) -> list[tuple[int, ...]]:  # noqa: ANN401
        """Shapes of `tensors` for a layer of shape (m, n) and its entry in config.json."""

    @abstractmethod
    def empty_layer(self, layer: nn.Linear | Conv1D, entry: Any) -> CompressedLayer:  # noqa: ANN401
        """A layer in a dense one's place, with its bias, dtype and device, and no values yet.

        Raises:
            ValueError: The entry is outside the layer's limits.
        """


class RankedForm(StoredForm):
    """A form of layers with a rank."""

    @abstractmethod
    def build(self, shape: tuple[int, int], rank: int, **options: Any) -> CompressedLayer:
        """A layer of shape (m, n) with no values yet.

        Args:
            shape: (out_features, in_features).
            rank: Its rank.
            **options: `bias`, `conv1d`, `device`, `dtype`.

        Raises:
            ValueError: The rank is outside the form's limits.
        """

    def empty_layer(self, layer: nn.Linear | Conv1D, entry: int) -> CompressedLayer:
        """A layer of the rank."""
        return self.build(linear_shape(layer), entry, **layer_options(layer))


def stored_tensors(
    name: str,
    form: StoredForm,
    shape: tuple[int, int],
    entry: Any,  # noqa: ANN401
    layout: Layout,
) -> dict[str, tuple[int, ...]]:
    """Shapes of what a file holds of a layer, without the bias, by the ends of the names.

    Args:
        name: The layer's name in config.json.
        form: Its stored form.
        shape: (m, n) of the dense layer in whose place it is.
        entry: Its entry in config.json.
        layout: Tells which of its weights are quantized; those are two tensors each.

    Raises:
        ValueError: A weight does not divide into the blocks that share a scale.
    """
    found: dict[str, tuple[int, ...]] = {}
    for tensor, size in zip(form.tensors, form.shapes(shape, entry), strict=True):
        module, _, end = f"{name}.{tensor}".rpartition(".")
        precision = layout.quantized.get(module) if end == "weight" else None
        if precision is None:
            found[tensor] = size
            continue
        parts = stored_shapes((size[0], size[1]), precision)
        before = tensor.removesuffix("weight")
        found |= {f"{before}{part}": part_shape for part, part_shape in parts.items()}
    return found


_STORED_FORMS: dict[str, StoredForm] = {}


def register(form: type[StoredForm]) -> type[StoredForm]:
    """Class decorator: makes a form known by its name."""
    _STORED_FORMS[form.name] = form()
    return form


def form_names(listed_in: str = "ranks") -> list[str]:
    """Sorted names of the forms whose layers this field of config.json lists."""
    return sorted(name for name, form in _STORED_FORMS.items() if form.listed_in == listed_in)


def stored_form(name: str) -> RankedForm:
    """The form of this name for layers with a rank.

    Raises:
        CheckpointError: There is none for layers with a rank.
    """
    form = _STORED_FORMS.get(name)
    if not isinstance(form, RankedForm):
        raise CheckpointError(f"form must be one of {', '.join(form_names())}; got {name!r}.")
    return form


def form_of(layer: CompressedLayer) -> StoredForm:
    """The form in which a layer is saved."""
    return _STORED_FORMS[layer.form]


def listed_layers(layout: Layout) -> list[tuple[str, StoredForm, Any]]:
    """(module name, stored form, entry) of every compressed layer in a config.json.

    Raises:
        CheckpointError: There is no such form.
    """
    factors, narrowed = stored_form(layout.form), _STORED_FORMS["narrowed"]
    ranks = {name: rank for name, rank in layout.ranks.items() if rank is not None}
    whole = {
        name: precision
        for name, precision in layout.quantized.items()
        if name not in layout.narrowed and name.rpartition(".")[0] not in ranks
    }
    return [
        *((name, factors, rank) for name, rank in ranks.items()),
        *((name, narrowed, shape) for name, shape in layout.narrowed.items()),
        *((name, _STORED_FORMS["quantized"], precision) for name, precision in whole.items()),
    ]

"""The tensors of a published VLM, part by part."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from models.common.errors import InputError
from models.common.pickled import open_weights
from models.common.tensors import Renamed, Tensors
from models.published.names import names_of_part


def tensors_of_part(directory: Path, *parts: str) -> Tensors:
    """The tensors of one part or several, by their names in it. Raises InputError where a file is damaged."""
    files = open_weights(directory)
    names = {name: raw for part in parts for name, raw in names_of_part(files, part).items()}
    return Renamed(files, names, str(directory))


def fill(module: nn.Module, directory: Path, part: str) -> None:
    """Copy a part's weights into a module, in place.

    Raises:
        InputError: the files lack one, or one has another shape.
    """
    tensors = tensors_of_part(directory, part)
    for name, parameter in module.named_parameters():
        if tensors.shape(name) != tuple(parameter.shape):
            found, expected = list(tensors.shape(name)), list(parameter.shape)
            raise InputError(f"{directory}: {part}.{name} has shape {found}, its config.json wants {expected}")
        if not parameter.is_meta:
            parameter.data.copy_(tensors.read(name))

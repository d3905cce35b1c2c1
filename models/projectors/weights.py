"""A projector's weights alone, from LLaVA's `mm_projector.bin` or a safetensors file.

model.mm_projector.0.weight, mm_projector.weight, multi_modal_projector.linear_1.weight, linear_1.weight
    -> the name in our module
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from models.common.errors import InputError
from models.common.pickled import open_file

log = logging.getLogger(__name__)

_PREFIX = re.compile(r"^(base_model\.model\.)*(model\.)?(mm_projector\.|multi_modal_projector\.|projector\.)")


def load_projector(module: nn.Module, path: str, names: Mapping[str, str]) -> None:
    """Copy the weights in a file into a projector, in place; tensors of other parts in the file are left and named.

    Args:
        names: the file's name for a layer (`0`, `2`) -> ours (`linear_1`, `linear_2`).

    Raises:
        InputError: the file lacks a weight, or has one that the projector does not know, or of another shape.
    """
    file = Path(path).expanduser()
    tensors = open_file(file)
    inside = {raw: _name(raw, names) for raw in tensors if _PREFIX.match(raw) or _is_bare(raw, module)}
    others = sorted(set(tensors) - set(inside))
    if others:
        log.info("%s: %d tensors of other parts are left (%s)", file, len(others), ", ".join(others[:3]))
    parameters = dict(module.named_parameters())
    by_name = {name: raw for raw, name in inside.items()}
    unknown, missing = sorted(set(by_name) - set(parameters)), sorted(set(parameters) - set(by_name))
    if unknown or missing:
        listed = ", ".join(by_name[name] for name in unknown) or "none"
        raise InputError(
            f"{file}: not the weights of this projector: {', '.join(missing) or 'nothing'} missing, unknown {listed};"
            " check model.projector.kind"
        )
    for name, parameter in parameters.items():
        found, expected = list(tensors.shape(by_name[name])), list(parameter.shape)
        if found != expected:
            raise InputError(f"{file}: {by_name[name]} has shape {found}, tower and language model want {expected}")
        if not parameter.is_meta:
            parameter.data.copy_(tensors.read(by_name[name]))


def _is_bare(raw: str, module: nn.Module) -> bool:
    return raw in dict(module.named_parameters())


def _name(raw: str, names: Mapping[str, str]) -> str:
    layer, _, leaf = _PREFIX.sub("", raw).rpartition(".")
    layer = names.get(layer, layer)
    return f"{layer}.{leaf}" if layer else leaf

"""Runs a model that is larger than memory: the weights of a layer come when it runs, and go when it has run.

    skeleton (no weights) --stream(model, fetch)--> the same model; model(...) asks fetch(name) for one unit at a time

A unit is an element of a list of layers (a decoder layer, an encoder layer) or any other module with weights of its
own. Memory is bounded by the largest unit and the activations. What runs is the model's own code, so that what is
computed is what the model computes when it is held whole. Does not own where weights come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Fetch = Callable[[str, nn.Module], Tensor]
"""The weight of a full parameter name, in the dtype it is used in, given the module that holds it. A `nn.Parameter`
(one that bitsandbytes has made, say) is used as it is."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have parameters that take no memory; their buffers are real."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    with init_empty_weights(include_buffers=False):
        yield


def units(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The (full name, module) of every unit of a model."""
    for name, child in model.named_children():
        full_name = f"{prefix}{name}"
        is_small = any(True for _ in child.parameters(recurse=False)) and not holds_layers(child)
        if isinstance(model, nn.ModuleList) or is_small:
            yield full_name, child
        else:
            yield from units(child, f"{full_name}.")


def holds_layers(module: nn.Module) -> bool:
    """Whether a list of layers lies inside: such a module is never a unit, whatever weights of its own it has."""
    return any(isinstance(child, nn.ModuleList) for child in module.modules())


class Unit:
    """Fills one unit's parameters before its forward and empties them after."""

    def __init__(self, prefix: str, module: nn.Module, fetch: Fetch, device: torch.device) -> None:
        self._prefix, self._module, self._fetch, self._device = prefix, module, fetch, device
        self._empty: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def load(self, *_: Any) -> None:
        """A forward pre-hook."""
        for path, owner in self._module.named_modules():
            full_path = ".".join(part for part in (self._prefix, path) if part)
            for key, empty in list(owner._parameters.items()):
                if empty is not None:
                    self._empty.append((owner, key, empty))
                    owner._parameters[key] = self._parameter(owner, f"{full_path}.{key}")

    def _parameter(self, owner: nn.Module, name: str) -> nn.Parameter:
        value = self._fetch(name, owner)
        if isinstance(value, nn.Parameter):
            return value
        return nn.Parameter(value.to(self._device), requires_grad=False)

    def free(self, *_: Any) -> None:
        """A forward hook."""
        for owner, key, empty in self._empty:
            owner._parameters[key] = empty
            state: Any = getattr(owner, "state", None)
            if state is not None:  # bitsandbytes keeps the values of a Linear8bitLt there too
                state.CB = state.SCB = None
            if hasattr(owner, "quant_state"):
                owner.__dict__["quant_state"] = None
        self._empty.clear()


def stream(model: nn.Module, fetch: Fetch, device: torch.device | None = None) -> nn.Module:
    """Make a skeleton runnable on `device`: each unit's weights are fetched for its forward alone."""
    device = device or torch.device("cpu")
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    for path, module in model.named_modules():
        for key, empty in list(module._parameters.items()) if holds_layers(module) else []:
            if empty is not None:  # a vector beside the layers, such as LLaVA-NeXT's newline: it stays
                full_path = f"{path}.{key}" if path else key
                module._parameters[key] = nn.Parameter(fetch(full_path, module).to(device), requires_grad=False)
    for name, module in units(model):
        unit = Unit(name, module, fetch, device)
        module.register_forward_pre_hook(unit.load)
        module.register_forward_hook(unit.free)
    return model.eval()

"""Runs a model that is larger than memory: a layer's weights are loaded when it runs, and freed afterwards.

    skeleton (no weights) --stream(model, fetch)--> the same model; model(...) asks fetch(name) for one unit at a time

A unit is an element of a list of layers (a decoder layer, an encoder layer) or any other module with weights of its
own. Memory is bounded by the largest unit and the activations. The model's own code runs, so the results are those of
the whole model. Does not own the source of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.common.errors import InputError

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
        if isinstance(model, nn.ModuleList) or (_has_own_weights(child) and not holds_layers(child)):
            yield full_name, child
        else:
            yield from units(child, f"{full_name}.")


def _has_own_weights(module: nn.Module) -> bool:
    """Whether a module's own forward reads weights: its parameters, or those in a container that has no forward.

    peft keeps an embedding's adapter in a ParameterDict beside the embedding, and DoRA reads the layer below it.
    """
    if hasattr(module, "base_layer"):
        return True
    holders = [module, *(each for each in module.children() if isinstance(each, nn.ParameterDict | nn.ParameterList))]
    return any(True for holder in holders for _ in holder.parameters(recurse=False))


def holds_layers(module: nn.Module) -> bool:
    """Whether a list of layers lies inside: such a module is never a unit, even if it has weights of its own."""
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
                    owner._parameters[key] = self._parameter(owner, f"{full_path}.{key}", empty)

    def _parameter(self, owner: nn.Module, name: str, empty: nn.Parameter) -> nn.Parameter:
        value = self._fetch(name, owner)
        if isinstance(value, nn.Parameter):
            return value
        return nn.Parameter(_of_shape(value, name, empty).to(self._device), requires_grad=False)

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


def _of_shape(value: Tensor, name: str, empty: nn.Parameter) -> Tensor:
    """`value`, once it is known to have the parameter's shape."""
    if value.shape != empty.shape:
        raise InputError(
            f"{name}: the files have shape {list(value.shape)}, the model's configuration wants {list(empty.shape)}; "
            "are the weights of this configuration?"
        )
    return value


def stream(
    model: nn.Module, fetch: Fetch, device: torch.device | None = None, *, by_hand: Collection[str] = ()
) -> nn.Module:
    """Make a skeleton runnable on `device`: each unit's weights are fetched only for its forward.

    Args:
        by_hand: full names of units that the caller loads and frees itself.
    """
    device = device or torch.device("cpu")
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    for path, module in model.named_modules():
        for key, empty in list(module._parameters.items()) if holds_layers(module) else []:
            if empty is not None:  # a vector outside the layers, such as LLaVA-NeXT's newline, is kept in memory
                full_path = f"{path}.{key}" if path else key
                value = _of_shape(fetch(full_path, module), full_path, empty)
                module._parameters[key] = nn.Parameter(value.to(device), requires_grad=False)
    for name, module in units(model):
        if name in by_hand:
            continue
        unit = Unit(name, module, fetch, device)
        module.register_forward_pre_hook(unit.load)
        module.register_forward_hook(unit.free)
    return model.eval()

"""int8 layers of bitsandbytes that move and are divided with the model that they are in, and say once what they cast.

`Linear8bitLt` moves its scales in a `to` of its own. torch moves a whole model by each module's `_apply`, so the scales
stay where they were (bitsandbytes 0.50, nn/modules.py), and the first product fails or reads another device's memory.
It also holds its weight a second time, as `state.CB`: a rank that gives up the weight would keep it all the same.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

_PRODUCTS = "bitsandbytes.autograd._functions"
"""The logger of int8 products."""


class _Once(logging.Filter):
    """Lets each text through once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self._told
        self._told.add(text)
        return is_new


def tell_casts_once() -> None:
    """Let bitsandbytes say once that an int8 layer's input is cast to fp16: it says so in every product of every layer.

    A step of a 7B in bf16 would write 450 lines into a rank's log (bitsandbytes 0.50, autograd/_functions.py).
    """
    logger = logging.getLogger(_PRODUCTS)
    if not any(isinstance(each, _Once) for each in logger.filters):
        logger.addFilter(_Once())


def keep_once(layer: nn.Module) -> None:
    """Let an int8 layer that is quantized hold its weight in `weight` alone; any other layer stays as it is."""
    if type(layer).__name__ != "Linear8bitLt" or layer.weight.dtype != torch.int8:
        return
    held: Any = layer
    if held.weight.SCB is not None:
        held.init_8bit_state()
    held.state = _state_of(held.weight, held.state)


def _state_of(weight: nn.Parameter, before: Any) -> Any:
    """An int8 layer's state whose matrix is the weight as it is now."""
    from bitsandbytes import MatmulLtState

    class State(MatmulLtState):
        @property
        def CB(self) -> torch.Tensor:  # noqa: N802 - bitsandbytes' name
            return weight.data

        @CB.setter
        def CB(self, _: torch.Tensor | None) -> None:  # noqa: N802
            """The weight is the only matrix."""

    state: Any = State()
    for name, value in vars(before).items():
        setattr(state, name, value)
    return state


def follow_weights(model: nn.Module) -> None:
    """Move what the int8 layers of a model keep beside their weight to the weight's device."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):  # peft names its adapter so, too
            _follow_weight(module)


def _follow_weight(layer: Any) -> None:
    weight = layer.weight
    if weight.dtype != torch.int8:
        return  # not quantized yet: its own `to` does that
    for owner in (weight, layer.state):
        if owner.CB is not None:
            owner.CB = weight.data  # the same tensor, not a copy; a layer of `keep_once` has it already
        if owner.SCB is not None:
            owner.SCB = owner.SCB.to(weight.device)

"""Where pretrained weights go while they are read, so that no rank ever holds a whole model that it will not keep.

    a file's tensor --one at a time--> the device that trains                      a model that every rank holds
                                  '--> this rank's elements of it, its `Share`     one that is divided over the ranks

A divided parameter keeps its shape, dtype and device, but no memory: its values are NaN (of integers 0) until the
engine takes its share over. Whoever changes weights in between asks `local_slice` and `cast`, whoever computes with
them `gathered` and `gathering`. Does not own which ranks there are, or how they exchange values: a `Placement` says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Division:
    """A model of which each rank keeps its own elements: of n ranks the r-th has the r-th n-th of each parameter."""

    rank: int
    world_size: int
    device: torch.device
    """Where shares lie; the host where parameters are offloaded."""
    gather: Callable[[Tensor], Tensor]
    """A vector of each rank, all of one length, to all of them end to end. A collective call."""


@dataclass(frozen=True)
class Placement:
    """Where weights that are read go."""

    device: torch.device
    division: Division | None = None


@dataclass
class Share:
    """This rank's elements of a divided parameter, which begin at `start` of it when flattened."""

    start: int
    values: Tensor
    """[numel], without padding; on a late rank there may be none."""
    division: Division
    device: torch.device
    """Where the parameter is, which may be another than that of its share."""


_HOST = Placement(torch.device("cpu"))
_current: ContextVar[Placement | None] = ContextVar("placement", default=None)


@contextmanager
def placing(placement: Placement) -> Iterator[None]:
    """In this context pretrained weights that are read go where `placement` says; without one, to the host."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)


def current_placement() -> Placement:
    """That of the innermost `placing`."""
    return _current.get() or _HOST


def share_of(parameter: Tensor) -> Share | None:
    """This rank's share of a divided parameter; None of one that is whole."""
    share: Share | None = getattr(parameter, "_share", None)
    return share


def divide(parameter: nn.Parameter, placement: Placement) -> None:
    """Keep this rank's elements of a parameter alone. One that is divided already stays as it is."""
    division = placement.division
    if division is None:
        return
    has_values = isinstance(parameter, nn.Parameter) and not parameter.is_meta
    if not has_values or share_of(parameter) is not None:
        return
    whole = parameter.data.reshape(-1)
    size = share_numel(whole.numel(), division.world_size)
    start = min(division.rank * size, whole.numel())
    values = torch.empty(min(size, whole.numel() - start), dtype=whole.dtype, device=division.device)
    values.copy_(whole[start : start + len(values)])
    set_share(parameter, Share(start, values, division, placement.device))


def set_share(parameter: Any, share: Share | None) -> None:
    """Make a parameter a divided one, which has no values of its own; None: it is divided no more."""
    parameter._share = share
    if share is not None:
        dtype = share.values.dtype
        nothing = torch.full((), math.nan if dtype.is_floating_point else 0, dtype=dtype, device=share.device)
        parameter.data = nothing.expand(parameter.shape)


def divide_all(module: nn.Module) -> None:
    """Divide what is still whole in a pretrained part, where the placement divides."""
    for parameter in module.parameters():
        divide(parameter, current_placement())


def share_numel(numel: int, world_size: int) -> int:
    """Elements of a parameter on each rank, with the padding that the last ones have."""
    return -(-numel // world_size)


def local_slice(parameter: Tensor) -> tuple[int, Tensor]:
    """(first element, values, flat): what this rank holds of a parameter; writing into the values changes it.

    A whole parameter must be contiguous.
    """
    share = share_of(parameter)
    return (0, parameter.data.view(-1)) if share is None else (share.start, share.values)


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parameter another dtype, in place."""
    share = share_of(parameter)
    if share is None:
        parameter.data = parameter.data.to(dtype)
    elif share.values.dtype != dtype:
        share.values = share.values.to(dtype)
        set_share(parameter, share)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """In this context divided parameters are whole, to be read. Entering it is collective where any is divided."""
    divided = [each for each in dict.fromkeys(parameters) if share_of(each) is not None]
    for parameter in divided:
        parameter.data = _whole(parameter)
    try:
        yield
    finally:
        for parameter in divided:
            set_share(parameter, share_of(parameter))


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """In this context a forward gathers each module's own divided parameters before it and gives them up after it."""
    open_ones: dict[nn.Module, ExitStack] = {}

    def before(module: nn.Module, _: Any) -> None:
        open_ones[module] = ExitStack()
        open_ones[module].enter_context(gathered(module.parameters(recurse=False)))

    def after(module: nn.Module, _: Any, __: Any) -> None:
        open_ones.pop(module).close()

    with ExitStack() as hooks:
        for module in model.modules():
            if any(share_of(each) is not None for each in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        try:
            yield
        finally:
            for stack in open_ones.values():  # of a forward that failed
                stack.close()


def _whole(parameter: nn.Parameter) -> Tensor:
    share = share_of(parameter)
    assert share is not None
    size = share_numel(parameter.numel(), share.division.world_size)
    padded = torch.zeros(size, dtype=share.values.dtype, device=parameter.device)
    padded[: len(share.values)].copy_(share.values)
    return share.division.gather(padded)[: parameter.numel()].view(parameter.shape)

"""How ZeRO holds what learns, a class for each way; only this and `trainer.engine` know DeepSpeed.

    stage 0       Replicated     every rank holds everything
    stage 1, 2    Sliced         a slice of each flattened group
    stage 3       Partitioned    a slice of every parameter

A `Holding` says where a rank's pieces of weights, gradients and Adam's moments lie, and does what follows from that:
dividing or dropping a gradient, having weights whole, setting them. Norms, learning rates and what a checkpoint gets
are the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor

from trainer.ranks import Ranks


@dataclass(frozen=True)
class Place:
    """A slice of a parameter of this `shape`: it begins at `start` of the parameter and at `offset` of a flat tensor.

    `flat` is what Adam keeps moments for; they and the gradient are laid out like it.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int
    shape: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The slice in a tensor that is laid out like `flat`, as a flat view."""
        return tensor.view(-1).narrow(0, self.offset, self.numel)


class Holding(Protocol):
    """One rank's part of what learns, in a DeepSpeed engine. Gradients are there after the last backward of a step."""

    @property
    def num_holders(self) -> int:
        """How many ranks hold the same element: a sum over ranks counts it so often."""

    def flats(self) -> list[Tensor]:
        """The tensors that Adam keeps moments for."""

    def place(self, parameter: Any) -> Place | None:
        """Where this rank's slice of a parameter lies; None where it holds none of it."""

    def group_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Numbers of the recipe's groups, and pieces of their gradients; a group may come more than once."""

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters, and this rank's slices of their gradients, flat."""

    def step(self, divisor: float) -> None:
        """Let DeepSpeed update the weights by the gradient divided by `divisor`."""

    def discard(self) -> None:
        """Throw the gradient away. Raises RuntimeError where DeepSpeed has taken a step on it instead."""

    def whole_weights(self) -> AbstractContextManager[None]:
        """Within it every parameter is whole on every rank and a forward makes no collective call."""

    def set_weights(self) -> AbstractContextManager[None]:
        """Within it trained weights are whole and are written, on every rank alike; at its end they are taken over."""


def _always_whole(_: Replicated | Sliced) -> AbstractContextManager[None]:
    return nullcontext()


# What ZeRO 1 to 3 share: an optimizer of DeepSpeed's that keeps gradients beside flat buffers of fp32 weights.


def _flat_gradients(holding: Sliced | Partitioned) -> Iterator[list[Tensor]]:
    """Of each flat buffer the pieces of its gradient, one after the other."""
    for number, weights in enumerate(holding.flats()):
        pieces = holding.engine.optimizer.averaged_gradients.get(number)
        if pieces is None:  # offloading puts the gradient where the optimizer looks for it
            assert weights.grad is not None
            pieces = [weights.grad]
        yield list(pieces)


def _gradients(holding: Sliced | Partitioned) -> Iterator[tuple[Tensor, Tensor]]:
    joined = [torch.cat([piece.reshape(-1) for piece in pieces]) for pieces in _flat_gradients(holding)]
    of_flat = dict(zip(holding.flats(), joined, strict=True))
    for parameter in holding.parameters:
        place = holding.place(parameter)
        if place is not None:
            yield parameter, place.of(of_flat[place.flat])


def _step(holding: Sliced | Partitioned, divisor: float) -> None:
    # What DeepSpeed calls an external loss scale: it divides gradients by it, in every stage. It would multiply the
    # next loss by it, too, so it is taken back below.
    optimizer = holding.engine.optimizer
    optimizer.custom_loss_scaler, optimizer.external_loss_scale = True, divisor
    holding.engine.step()
    optimizer.custom_loss_scaler, optimizer.external_loss_scale = False, None


def _discard(holding: Sliced | Partitioned) -> None:
    # DeepSpeed drops a gradient that is not finite, on every rank and with everything it had put aside; so it is made
    # not finite.
    for pieces in _flat_gradients(holding):
        for piece in pieces:
            piece.fill_(math.nan)
    norms = getattr(holding.engine.optimizer, "norm_for_param_grads", {})  # offloading takes them when it copies
    for key in norms:
        norms[key] = torch.full_like(torch.as_tensor(norms[key]), math.inf)
    holding.engine.step()
    if holding.engine.was_step_applied():
        raise RuntimeError("DeepSpeed took a step on a gradient that was to be discarded")


@dataclass(frozen=True)
class Replicated:
    """ZeRO 0: what learns are the parameters themselves, and their gradients are their own."""

    engine: Any
    parameters: list[Any]
    ranks: Ranks

    whole_weights = set_weights = _always_whole

    @property
    def num_holders(self) -> int:
        """Every rank."""
        return self.ranks.world_size

    def flats(self) -> list[Tensor]:
        """The parameters, in their shapes."""
        return list(self.parameters)

    def place(self, parameter: Any) -> Place:
        """All of it."""
        return Place(parameter, offset=0, start=0, numel=parameter.numel(), shape=tuple(parameter.shape))

    def group_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Each group once."""
        for number, group in enumerate(self.engine.optimizer.param_groups):
            yield number, [parameter.grad for parameter in group["params"] if parameter.grad is not None]

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of no element where nothing reached a parameter."""
        for parameter in self.parameters:
            yield parameter, torch.zeros(0) if parameter.grad is None else parameter.grad.reshape(-1)

    def step(self, divisor: float) -> None:
        """Divided in place: without ZeRO's optimizer there is no loss scale to divide by."""
        if divisor != 1.0:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(divisor)
        self.engine.step()

    def discard(self) -> None:
        """DeepSpeed has put nothing aside."""
        self.engine.zero_grad()


@dataclass(frozen=True)
class Sliced:
    """ZeRO 1 and 2: whole parameters for the forward; a slice of each flattened group's fp32 weights learns."""

    engine: Any
    parameters: list[Any]
    ranks: Ranks

    num_holders = 1
    gradients, step, discard, whole_weights = _gradients, _step, _discard, _always_whole

    def flats(self) -> list[Tensor]:
        """One a group."""
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def place(self, parameter: Any) -> Place | None:
        """A parameter may lie in the slices of several ranks, or all of it in another's."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat, inner = self.flats()[mapping.param_group_index], mapping.hp_fragment_address
        return Place(flat, inner.start, mapping.lp_fragment_address.start, inner.numel, tuple(parameter.shape))

    def group_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Each group once."""
        return enumerate(_flat_gradients(self))

    @contextmanager
    def set_weights(self) -> Iterator[None]:
        """Taken over into the slices."""
        yield
        self.engine.optimizer.refresh_fp32_params()


@dataclass(frozen=True)
class Partitioned:
    """ZeRO 3: a slice of every parameter and no more, in flat buffers of which a group may have several."""

    engine: Any
    parameters: list[Any]
    ranks: Ranks

    num_holders = 1
    gradients, step, discard = _gradients, _step, _discard

    def flats(self) -> list[Tensor]:
        """From DeepSpeed's own list: the groups of Adam are empty between two steps."""
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def place(self, parameter: Any) -> Place | None:
        """ZeRO-3 pads every parameter to a multiple of the ranks; the padding belongs to nobody."""
        optimizer = self.engine.optimizer
        number, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = self.ranks.rank * numel
        numel = min(numel, parameter.ds_numel - start)
        return Place(self.flats()[number], offset, start, numel, tuple(parameter.ds_shape)) if numel > 0 else None

    def group_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """A group as often as it has flat buffers."""
        for number, pieces in enumerate(_flat_gradients(self)):
            yield self.engine.optimizer.sub_group_to_group_id[number], pieces

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """It takes the whole model's memory. Hooks that would gather and release module by module are off meanwhile."""
        hooks = self.engine.optimizer.parameter_offload
        hooks.destroy()
        try:
            with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
                yield
        finally:
            hooks.forward_hooks, hooks.backward_hooks = [], []
            hooks.setup_zero_stage3_hooks()

    @contextmanager
    def set_weights(self) -> Iterator[None]:
        """Gathered, and what the first rank wrote is partitioned again."""
        with deepspeed.zero.GatheredParameters(self.parameters, modifier_rank=0):
            yield
        self.engine.optimizer.refresh_fp32_params()


HOLDINGS: dict[int, type[Replicated | Sliced | Partitioned]] = {0: Replicated, 1: Sliced, 2: Sliced, 3: Partitioned}
"""By the `stage` of a ds_config's `zero_optimization`."""

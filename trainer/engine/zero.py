"""The weights, gradients and moments of each ZeRO stage: one backend per layout.

    stage 0       Replicated     every rank holds every element
    stage 1, 2    Sliced         whole parameters; of fp32 weights and moments a slice of each flattened group
    stage 3       Partitioned    a slice of every parameter

Rajbhandari et al. 2020 (arXiv:1910.02054) is the method; DeepSpeed has no public way to see a rank's slices, so this
module reads private parts of 0.19: its comments name file and attribute below deepspeed/runtime/, and
tests/trainer/engine/test_zero.py fails where one of them has changed. Norms, learning rates, clipping and what goes
into a checkpoint belong to `trainer.engine.engine`.
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

from trainer.distributed.context import DistributedContext


@dataclass(frozen=True)
class ParamShard:
    """Elements [start, start + numel) of a flattened parameter, which are stored in `flat` from `offset` on.

    `flat` is a buffer that Adam keeps moments for. Its moments and its gradient have its layout.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int
    shape: tuple[int, ...]
    """Of the whole parameter."""

    def view(self, buffer: Tensor) -> Tensor:
        """The slice as a view of shape [numel].

        Args:
            buffer: `flat` or a tensor of its layout (a moment, the gradient).
        """
        return buffer.view(-1).narrow(0, self.offset, self.numel)


class ZeroBackend(Protocol):
    """One rank's part of the trained parameters in a DeepSpeed engine.

    Gradients can be read from the end of a step's last backward until `step` or `discard`.
    """

    @property
    def replication_degree(self) -> int:
        """How many ranks hold the same element, so how often a sum over all ranks counts it."""

    def flat_buffers(self) -> list[Tensor]:
        """The tensors that Adam keeps moments for on this rank."""

    def param_shard(self, parameter: Any) -> ParamShard | None:
        """This rank's slice of a trained parameter, or None where it holds none of it."""

    def group_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """(index of a parameter group, pieces of its gradient on this rank); an index may come more than once."""

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, gradient of this rank's slice of it, flat) for each parameter that this rank holds part of."""

    def step(self, divisor: float) -> None:
        """Update the weights by the gradient divided by `divisor`."""

    def discard(self) -> None:
        """Drop the gradient and leave weights and moments as they are, bit for bit.

        Raises:
            RuntimeError: DeepSpeed took a step on it instead.
        """

    def whole_weights(self) -> AbstractContextManager[None]:
        """In this context every rank has every whole parameter and a forward makes no collective call."""

    def set_weights(self) -> AbstractContextManager[None]:
        """In this context trained parameters are whole and may be written, with the same values on every rank.

        On leaving it, the fp32 weights that Adam updates are made equal to them.
        """


def whole_numel(parameter: Any) -> int:
    """Elements of a whole parameter; under ZeRO-3 the tensor itself holds none between two forwards."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # zero/partition_parameters.py


def _always_whole(_: Replicated | Sliced) -> AbstractContextManager[None]:
    return nullcontext()


# Shared by ZeRO 1, 2 and 3. Their optimizers (DeepSpeedZeroOptimizer in zero/stage_1_and_2.py,
# DeepSpeedZeroOptimizer_Stage3 in zero/stage3.py) keep gradients beside flat buffers of fp32 weights.


def _flat_gradients(backend: Sliced | Partitioned) -> Iterator[list[Tensor]]:
    """For each flat buffer the pieces of its gradient; one after the other they have its layout."""
    for index, weights in enumerate(backend.flat_buffers()):
        # `averaged_gradients` (both files): index of the flat buffer -> reduced pieces, or None once they are used.
        pieces = backend.engine.optimizer.averaged_gradients.get(index)
        if pieces is None:
            # With the optimizer offloaded both stages copy gradients to the host as they are reduced, into the .grad
            # of the fp32 buffer (stage3.py, _offload_grad_partition_at_boundary).
            assert weights.grad is not None
            pieces = [weights.grad]
        yield list(pieces)


def _gradients(backend: Sliced | Partitioned) -> Iterator[tuple[Tensor, Tensor]]:
    joined = [torch.cat([piece.reshape(-1) for piece in pieces]) for pieces in _flat_gradients(backend)]
    gradient_of = dict(zip(backend.flat_buffers(), joined, strict=True))
    for parameter in backend.parameters:
        shard = backend.param_shard(parameter)
        if shard is not None:
            yield parameter, shard.view(gradient_of[shard.flat])


def _step(backend: Sliced | Partitioned, divisor: float) -> None:
    # With `custom_loss_scaler` set, `loss_scale` is `external_loss_scale` (_get_loss_scale, both files), and
    # unscale_and_clip_grads divides every gradient by it just before Adam: the one place where a factor costs no pass
    # over the gradients. The next backward would multiply its loss by it (base_optimizer.py, scale_if_loss), so it is
    # taken back. override_loss_scale, the public way in, cannot take it back.
    optimizer = backend.engine.optimizer
    optimizer.custom_loss_scaler, optimizer.external_loss_scale = True, divisor
    backend.engine.step()
    optimizer.custom_loss_scaler, optimizer.external_loss_scale = False, None


def _discard(backend: Sliced | Partitioned) -> None:
    # zero_grad clears the parameters' .grad only; what lies in averaged_gradients, in the host's buffers and in the
    # count of micro-steps stays, and the next step would add to it
    # (https://github.com/deepspeedai/DeepSpeed/pull/6554). DeepSpeed drops all of it on every rank when the gradient's
    # norm is not finite (step, both files: is_invalid_grad_norm -> overflow), so the gradient is made not finite.
    pieces = [piece for flat_pieces in _flat_gradients(backend) for piece in flat_pieces]
    for piece in pieces:
        piece.fill_(math.nan)
    # With an offloaded optimizer the norm is not taken from the buffers but from `norm_for_param_grads` (both files),
    # which was filled while they were copied.
    norms = getattr(backend.engine.optimizer, "norm_for_param_grads", {})
    for key in norms:
        norms[key] = torch.full_like(torch.as_tensor(norms[key]), math.inf)
    backend.engine.step()
    # zero/stage3.py, partition_grads, writes a slice of nothing but padding never, and that of a parameter without a
    # gradient not in every step: not finite there, every later step would be refused.
    for piece in pieces:
        piece.zero_()
    if backend.engine.was_step_applied():
        raise RuntimeError("DeepSpeed took a step on a gradient that was to be discarded")


@dataclass(frozen=True)
class Replicated:
    """ZeRO 0: Adam updates the parameters themselves, with their own gradients, the same on every rank."""

    engine: Any
    parameters: list[Any]
    ranks: DistributedContext

    whole_weights = set_weights = _always_whole

    @property
    def replication_degree(self) -> int:
        """Every rank holds every element."""
        return self.ranks.world_size

    def flat_buffers(self) -> list[Tensor]:
        """The parameters, in their own shapes."""
        return list(self.parameters)

    def param_shard(self, parameter: Any) -> ParamShard | None:
        """The whole parameter."""
        return ParamShard(parameter, offset=0, start=0, numel=parameter.numel(), shape=tuple(parameter.shape))

    def group_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Each group once; a parameter that no loss reached has no piece."""
        for index, group in enumerate(self.engine.optimizer.param_groups):
            yield index, [parameter.grad for parameter in group["params"] if parameter.grad is not None]

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter; the gradient of one that no loss reached has no elements."""
        for parameter in self.parameters:
            yield parameter, torch.zeros(0) if parameter.grad is None else parameter.grad.reshape(-1)

    def step(self, divisor: float) -> None:
        """Divide in place, then step: without a ZeRO optimizer there is no loss scale that would divide."""
        if divisor != 1.0:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(divisor)
        self.engine.step()

    def discard(self) -> None:
        """Clear the parameters' gradients; without a ZeRO optimizer DeepSpeed keeps no others."""
        self.engine.zero_grad()


@dataclass(frozen=True)
class Sliced:
    """ZeRO 1 and 2: the forward uses whole parameters; Adam updates this rank's slice of each flattened group."""

    engine: Any
    parameters: list[Any]
    ranks: DistributedContext

    replication_degree = 1
    gradients, step, discard, whole_weights = _gradients, _step, _discard, _always_whole

    def flat_buffers(self) -> list[Tensor]:
        """One for each parameter group (zero/stage_1_and_2.py, `single_partition_of_fp32_groups`)."""
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def param_shard(self, parameter: Any) -> ParamShard | None:
        """A parameter may lie in one rank's slice, or across the borders of several."""
        # utils/mixed_precision_linkage.py (link_hp_params) leaves this on every parameter: the `tensor_fragment` of
        # utils/tensor_fragment.py, or None where this rank's slice holds none of it. "lp" is the parameter, "hp" the
        # flat fp32 buffer.
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        in_buffer, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        return ParamShard(
            self.flat_buffers()[mapping.param_group_index],
            offset=in_buffer.start,
            start=in_parameter.start,
            numel=in_buffer.numel,
            shape=tuple(parameter.shape),
        )

    def group_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Each group once."""
        return enumerate(_flat_gradients(self))

    @contextmanager
    def set_weights(self) -> Iterator[None]:
        """Parameters are whole already; afterwards the slices are filled from them."""
        yield
        self.engine.optimizer.refresh_fp32_params()


@dataclass(frozen=True)
class Partitioned:
    """ZeRO 3: this rank holds a slice of every parameter; Adam updates flat buffers made of those slices."""

    engine: Any
    parameters: list[Any]
    ranks: DistributedContext

    replication_degree = 1
    gradients, step, discard = _gradients, _step, _discard

    def flat_buffers(self) -> list[Tensor]:
        """One for each sub-group: a parameter group is cut into several at `sub_group_size` elements."""
        # zero/stage3.py, `fp32_partitioned_groups_flat`. Adam's own groups are empty between two steps: _optimizer_step
        # puts one sub-group's buffer into them and takes it out again.
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def param_shard(self, parameter: Any) -> ParamShard | None:
        """Every rank has the same number of elements of a parameter; the last ones may be padding or nothing else."""
        # zero/stage3.py, set_grad_positions: parameter -> (flat buffer, offset in it, elements with padding).
        # ds_numel and ds_shape (zero/partition_parameters.py) are those of the whole parameter.
        optimizer = self.engine.optimizer
        index, offset, num_padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = self.ranks.rank * num_padded
        numel = min(num_padded, parameter.ds_numel - start)
        if numel <= 0:
            return None
        return ParamShard(self.flat_buffers()[index], offset, start, numel, tuple(parameter.ds_shape))

    def group_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """A group comes once for each of its sub-groups."""
        for index, pieces in enumerate(_flat_gradients(self)):
            # zero/stage3.py: the index in the groups that Adam was given, whatever DeepSpeed left out or cut up.
            yield self.engine.optimizer.sub_group_to_group_id[index], pieces

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Needs memory for the whole model on every rank."""
        # The hooks that gather a module before its forward would release it after it, so they are removed meanwhile.
        # DeepSpeed's unwrap_model_for_generation (zero/stage3.py, https://github.com/deepspeedai/DeepSpeed/pull/5658)
        # leaves one of them, whose reset_step compares the ranks in a collective call, and an exception in it leaves
        # the module without hooks.
        hooks = self.engine.optimizer.parameter_offload  # zero/parameter_offload.py, DeepSpeedZeRoOffload
        hooks.destroy()
        try:
            with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
                yield
        finally:
            hooks.forward_hooks, hooks.backward_hooks = (
                [],
                [],
            )  # destroy keeps the handles; the next one would add to them
            hooks.setup_zero_stage3_hooks()

    @contextmanager
    def set_weights(self) -> Iterator[None]:
        """Gathered; on leaving, what the first rank wrote is partitioned and the fp32 buffers are filled from it."""
        with deepspeed.zero.GatheredParameters(self.parameters, modifier_rank=0):
            yield
        self.engine.optimizer.refresh_fp32_params()


ZERO_BACKENDS: dict[int, type[Replicated | Sliced | Partitioned]] = {
    0: Replicated,
    1: Sliced,
    2: Sliced,
    3: Partitioned,
}
"""By the `stage` of a DeepSpeed configuration's `zero_optimization`."""

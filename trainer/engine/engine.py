"""A DeepSpeed engine around a `TrainingTask`, behind a few plain methods.

    forward -> backward (per micro-batch) -> squared_norms -> step or discard
    fragments: this rank's slices of the trained weights and of their Adam moments, as flat fp32 tensors

What depends on the ZeRO stage - a rank's slices, how a gradient is divided or dropped - is in
`trainer.engine.zero`. A fragment says which slice of which parameter it is, so a checkpoint depends neither on the ZeRO
stage nor on the number of ranks. Nothing else in the project handles a DeepSpeed object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from trainer.checkpoint.format import Fragment
from trainer.config.schema import AdamW, EngineConfig
from trainer.distributed.context import DistributedContext
from trainer.engine.adam import build_adam, step_count
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.muon import import_muon_as_written
from trainer.engine.numerics import needed_bytes
from trainer.engine.partitions import hand_over
from trainer.engine.private_parts import check_private_parts
from trainer.engine.train_step import TrainingTask
from trainer.engine.tuning import ParameterGroup
from trainer.engine.zero import ZERO_BACKENDS, ParamShard, ZeroBackend, whole_numel
from trainer.objectives.loss_sum import LossSum

Fill = Callable[[str, Sequence[tuple[str, int, Tensor]]], None]
"""(kind, [(name, start, values)]) fills each tensor with elements [start, start + numel) of a flattened parameter.

The kind is "weight" or one of `MOMENTS`; tensors are flat and contiguous (`trainer.checkpoint.reader`).
"""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of a parameter, by torch.optim.AdamW's own names; checkpoints use them too."""


def build_engine(
    module: TrainingTask,
    groups: list[ParameterGroup],
    *,
    config: EngineConfig,
    optimizer: AdamW,
    micro_rows: int,
    num_micro_batches: int,
    ranks: DistributedContext,
) -> Engine:
    """Wrap a module with DeepSpeed. A collective call: every rank makes it, after `start_distributed`.

    Args:
        module: on its device; its trained parameters are those of `groups`, all of one dtype: fp32, or bf16, for which
            the engine keeps fp32 masters.
        micro_rows: rows of one micro-batch on one rank.
        num_micro_batches: micro-batches of one step on one rank.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    device = parameters[0].device.type
    # DeepSpeed wraps this optimizer and calls it for every update, so learning rates and moments stay accessible.
    adam = build_adam(groups, optimizer, device)
    settings = deepspeed_config(
        config,
        clip_norm=optimizer.clip_norm,
        micro_rows=micro_rows,
        num_micro_batches=num_micro_batches,
        world_size=ranks.world_size,
        device=device,
        reduced_as=parameters[0].dtype,
        num_trained=sum(whole_numel(parameter) for parameter in parameters),
    )
    hand_over(module, settings)
    import_muon_as_written()
    engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=settings)
    stage = settings["zero_optimization"]["stage"]
    check_private_parts(engine, stage)
    backend = ZERO_BACKENDS[stage](engine, parameters, ranks)
    return Engine(
        deepspeed_engine=engine,
        adam=adam,
        groups=groups,
        backend=backend,
        ranks=ranks,
        clip_norm=optimizer.clip_norm or math.inf,
    )


class Engine:
    """Gradients are sums over the global batch; learning rates come from outside; a step is clipped by the whole norm.

    `build_engine` makes one. Methods marked "collective" must be called on every rank, in the same order.
    """

    def __init__(
        self,
        *,
        deepspeed_engine: Any,
        adam: torch.optim.AdamW,
        groups: list[ParameterGroup],
        backend: ZeroBackend,
        ranks: DistributedContext,
        clip_norm: float,
    ) -> None:
        self.groups = groups
        """In the order of `learning_rates` and `squared_norms`."""
        self._engine, self._adam, self._backend = deepspeed_engine, adam, backend
        self._ranks, self._clip_norm = ranks, clip_norm
        self._names = {id(p): name for group in groups for name, p in zip(group.names, group.parameters, strict=True)}
        self._parameters = [parameter for group in groups for parameter in group.parameters]

    @property
    def module(self) -> TrainingTask:
        """The wrapped module: calling it directly makes no gradient that DeepSpeed handles."""
        module: TrainingTask = self._engine.module
        return module

    def forward(self, batch: Batch, *, is_last: bool) -> LossSum:
        """Compute one micro-batch, with a graph for `backward`. Collective under ZeRO-3.

        Args:
            is_last: whether it is the last micro-batch of the step.
        """
        # DeepSpeed asks that it be set before the forward (https://github.com/deepspeedai/DeepSpeed/pull/1588): set
        # only before the backward, gradients are added up in another order and their last bits differ.
        self._engine.set_gradient_accumulation_boundary(is_last)
        sums: LossSum = self._engine(batch)
        return sums

    def backward(self, loss_sum: Tensor, num_targets: float, scale: float = 1.0) -> None:
        """Add the gradient of scale x loss_sum / num_targets to the step's. Collective.

        Args:
            loss_sum: scalar, the sum over the targets of one micro-batch.
            num_targets: targets of the whole global batch, over all micro-batches and ranks.
            scale: the loss scale.
        """
        # DeepSpeed divides by the number of ranks when it reduces; multiplied back, a gradient is the sum over all.
        # scale_wrt_gas would divide by the number of micro-batches, too.
        self._engine.backward(loss_sum * (scale * self._ranks.world_size / num_targets), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # updates nothing before the boundary; called to count the micro-batch

    def evaluate(self, batch: Batch) -> LossSum:
        """Compute one micro-batch without a gradient and without dropout. Collective under ZeRO-3."""
        self._engine.eval()
        with torch.no_grad():
            sums: LossSum = self._engine(batch)
        self._engine.train()
        return sums

    def squared_norms(self) -> list[float]:
        """This rank's share of each group's squared gradient norm, after the step's last backward.

        Returns:
            One number per group, including the loss scale. Summed over the ranks they are the squared norms. Not finite
            where an element of the gradient is not.
        """
        share = 1.0 / self._backend.replication_degree
        sums = [0.0] * len(self.groups)
        for group, pieces in self._backend.group_gradients():
            if pieces:
                # fp64: in fp32 the last bit of a norm depends on how the memory is aligned, and a resumed run's
                # clipping with it.
                norms = torch._foreach_norm([piece.detach() for piece in pieces], 2, dtype=torch.float64)
                sums[group] += share * float(torch.stack(list(norms)).square().sum())
        return sums

    def learning_rates(self, factor: float) -> list[float]:
        """Each group's peak learning rate times the schedule's `factor`."""
        return [group.learning_rate * factor for group in self.groups]

    def step(self, factor: float, norm: float, scale: float = 1.0) -> None:
        """Clip the gradient and update the weights, each group at its peak learning rate times `factor`. Collective.

        Args:
            factor: the learning-rate schedule's factor, in [0, 1].
            norm: of the whole gradient over all ranks, without `scale`; finite.
            scale: the loss scale that `backward` was given.

        Raises:
            RuntimeError: DeepSpeed refused the step.
        """
        for group, rate in zip(self._adam.param_groups, self.learning_rates(factor), strict=True):
            group["lr"] = rate
        self._backend.step(scale * max(1.0, norm / self._clip_norm))
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed refused a step whose gradient had been found finite on every rank")

    def discard(self) -> None:
        """Drop the gradient instead of a step: weights and moments stay unchanged, bit for bit. Collective."""
        self._backend.discard()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, this rank's slice of its gradient, flat), after the step's last backward.

        Under ZeRO-0 every rank gives every parameter; `own_gradients` gives each element once over the ranks.
        """
        for parameter, piece in self._backend.gradients():
            yield self._names[id(parameter)], piece

    def own_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Like `gradients`, but each element comes once over all ranks."""
        return self.gradients() if self._is_first_holder else iter(())

    def slices(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, this rank's slice of it, flat fp32); each element comes once over all ranks."""
        for fragment in self.fragments():
            yield fragment.name, fragment.weight

    def fragments(self) -> Iterator[Fragment]:
        """This rank's slices of weights and moments, as views; each element comes once over all ranks."""
        return self._local_fragments() if self._is_first_holder else iter(())

    @property
    def _is_first_holder(self) -> bool:
        """Whether this rank is the first of those that hold the same elements."""
        return self._ranks.rank % self._backend.replication_degree == 0

    def _local_fragments(self) -> Iterator[Fragment]:
        """The slices in this rank's memory: under ZeRO-0 everything, on every rank."""
        for parameter in self._parameters:
            shard = self._backend.param_shard(parameter)
            if shard is not None:
                name, weight = self._names[id(parameter)], shard.view(shard.flat.data)
                yield Fragment(name, shard.shape, shard.start, weight, self._moments(shard))

    def _moments(self, shard: ParamShard) -> dict[str, Tensor]:
        """Empty before the first step: Adam makes its state in it."""
        state = self._adam.state.get(shard.flat, {})
        return {kind: shard.view(state[kind]) for kind in MOMENTS if kind in state}

    def whole_weights(self) -> AbstractContextManager[None]:
        """In this context every rank has every whole parameter and a forward is not collective, so ranks may generate.

        Entering and leaving it is collective, and under ZeRO-3 needs memory for the whole model.
        """
        return self._backend.whole_weights()

    def probe_bytes(self) -> int:
        """Memory that `whole_weights` and, in it, `trainer.engine.numerics.compare_gradients` take on this rank."""
        missing = [(whole_numel(each) - each.numel()) * each.element_size() for each in self.module.parameters()]
        return sum(missing) + needed_bytes(self.module, self.groups, whole_numel)

    def set_weights(self, fill: Fill) -> None:
        """Replace every trained weight by that of a checkpoint. Collective."""
        with self._backend.set_weights():
            fill("weight", [(self._names[id(each)], 0, each.data.view(-1)) for each in self._parameters])
        if any(parameter.dtype != torch.float32 for parameter in self._parameters):
            self.set_masters(fill, set(self._names.values()))

    def set_masters(self, fill: Fill, names: Collection[str]) -> None:
        """Set the fp32 masters of these bf16 weights to what the weights are rounded from; the weights stay."""
        held = [each for each in self._local_fragments() if each.name in names]
        fill("weight", [(each.name, each.start, each.weight.view(-1)) for each in held])

    @property
    def num_updates(self) -> int:
        """Updates that Adam has made, by its own count, which its bias correction uses."""
        counts = {int(state["step"]) for state in self._adam.state.values() if "step" in state}
        return max(counts, default=0)

    def load_moments(self, fill: Fill, num_updates: int) -> None:
        """Set Adam's state to that of a checkpoint.

        Args:
            num_updates: the value of the property of that name.
        """
        for flat in self._backend.flat_buffers():
            self._adam.state[flat] = {
                "step": step_count(self._adam, flat, num_updates),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }
        held = list(self._local_fragments())
        for kind in MOMENTS:
            fill(kind, [(each.name, each.start, each.moments[kind].view(-1)) for each in held])

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks, which would keep the model in memory."""
        self._engine.destroy()

"""A ZeRO engine around a `TrainStep`, seen through a few plain methods; only this and `trainer.zero` know DeepSpeed.

    forward -> backward (per micro-batch) -> squared_norms -> step, at the learning rates it is told, or discard
    fragments: this rank's pieces of the trained weights and of their Adam moments, as flat fp32 tensors

What a ZeRO stage changes - where a rank's pieces lie, how a gradient is divided or dropped - is in `trainer.zero`. A
fragment says which slice of which parameter it is, so that a checkpoint does not depend on the ZeRO stage or on the
number of ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from trainer.checkpoint import Fragment
from trainer.config import AdamW, EngineConfig
from trainer.objectives import LossSum
from trainer.ranks import Ranks
from trainer.step import TrainStep
from trainer.tuning import ParameterGroup
from trainer.zero import HOLDINGS, Holding, Place

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
MOMENTS = ("exp_avg", "exp_avg_sq")


def start_distributed(ranks: Ranks, timeout_s: float) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo elsewhere), once a process; the device of this rank.

    A collective that is not done after `timeout_s` fails: the last resort, after `trainer.watch` has looked.
    """
    has_cuda = torch.cuda.is_available()
    # On a CPU DeepSpeed would compile a shared-memory op here, 40 s of a C++ compiler, and hang on its lock file if a
    # build was once killed. gloo does the same reductions.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if has_cuda:
        torch.cuda.set_device(ranks.local_rank)
    deepspeed.init_distributed(
        dist_backend="nccl" if has_cuda else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False
    )
    return torch.device("cuda", ranks.local_rank) if has_cuda else torch.device("cpu")


def leave_distributed() -> None:
    """Leave the process group; a run that ends without this waits for its peers' sockets."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Engine:
    """A DeepSpeed engine whose gradients are sums over the global batch and whose learning rate comes from outside."""

    def __init__(
        self,
        module: TrainStep,
        groups: list[ParameterGroup],
        *,
        config: EngineConfig,
        optimizer: AdamW,
        micro_rows: int,
        num_micro_batches: int,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._clip_norm = optimizer.clip_norm or math.inf
        self._num_groups = len(groups)
        self._names = {id(p): name for group in groups for name, p in zip(group.names, group.parameters, strict=True)}
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        # The rates are set before every step; 0 here makes a step that forgot to set them visible.
        # DeepSpeed wraps it, and it is still this one that makes the update: rates and moments are its own.
        self._adam = torch.optim.AdamW(
            [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups],
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
        )
        settings = _settings(config, micro_rows, num_micro_batches, ranks.world_size)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._adam, config=settings)
        way = HOLDINGS[settings["zero_optimization"]["stage"]]
        self._holding: Holding = way(self._engine, self._parameters, ranks)

    @property
    def module(self) -> TrainStep:
        """What the engine was built around."""
        module: TrainStep = self._engine.module
        return module

    def forward(self, batch: Batch, *, is_last: bool) -> LossSum:
        """The sums of one micro-batch; `is_last` says whether it is the step's last one."""
        # Already the forward goes by it: told only before the backward, gradients are added up in another order.
        self._engine.set_gradient_accumulation_boundary(is_last)
        sums: LossSum = self._engine(batch)
        return sums

    def backward(self, loss_sum: Tensor, num_targets: float, scale: float = 1.0) -> None:
        """Add the gradient of scale * loss_sum / num_targets, where num_targets counts the whole global batch.

        DeepSpeed divides by the number of ranks when it reduces; multiplied back, a gradient is the sum over all.
        """
        self._engine.backward(loss_sum * (scale * self._ranks.world_size / num_targets), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def evaluate(self, batch: Batch) -> LossSum:
        """The sums of one micro-batch without a gradient and without dropout."""
        self._engine.eval()
        with torch.no_grad():
            sums: LossSum = self._engine(batch)
        self._engine.train()
        return sums

    def squared_norms(self) -> list[float]:
        """This rank's share of each group's squared gradient norm, after the last backward; the sum over ranks is it.

        Not finite wherever an element of the gradient is not.
        """
        share = 1.0 / self._holding.num_holders
        sums = [0.0] * self._num_groups
        for group, pieces in self._holding.group_gradients():
            if pieces:
                # In fp32 the last bit of a norm depends on how the memory is aligned, and with it a resumed run's.
                norms = torch._foreach_norm([piece.detach() for piece in pieces], 2, dtype=torch.float64)
                sums[group] += share * float(torch.stack(list(norms)).square().sum())
        return sums

    def step(self, learning_rates: list[float], norm: float, scale: float = 1.0) -> None:
        """Update the weights at one learning rate a group, with the gradient clipped by its norm.

        `norm` is the gradient's without the `scale` that its backward was told.
        """
        for group, rate in zip(self._adam.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self._holding.step(scale * max(1.0, norm / self._clip_norm))
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed refused a step whose gradient had been found finite on every rank")

    def discard(self) -> None:
        """Throw the gradient away instead of a step: weights and moments stay bit for bit what they were."""
        self._holding.discard()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's slices of the gradient after the last backward, flat, with the name of their parameter."""
        for parameter, piece in self._holding.gradients():
            yield self._names[id(parameter)], piece

    def slices(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's slices of the trained weights, flat, with their names; over all ranks each element once."""
        for fragment in self.fragments():
            yield fragment.name, fragment.weight

    def own_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """`gradients`, but over all ranks each element once."""
        return self.gradients() if self._is_first_holder else iter(())

    def whole_weights(self) -> AbstractContextManager[None]:
        """Within it every parameter is whole on every rank and a forward makes no collective call: ranks may generate.

        Under ZeRO-3 that takes the memory of the whole model.
        """
        return self._holding.whole_weights()

    def set_weights(self, read: Callable[[str], Tensor]) -> None:
        """Put `read(name)` in place of every trained weight, on every rank alike."""
        with self._holding.set_weights():
            for parameter in self._parameters:
                parameter.data.copy_(read(self._names[id(parameter)]))

    def fragments(self) -> Iterator[Fragment]:
        """This rank's slices of everything that learns; over all ranks each element comes exactly once."""
        return self._held() if self._is_first_holder else iter(())

    @property
    def _is_first_holder(self) -> bool:
        """Whether this rank is the first of those that hold the same."""
        return self._ranks.rank % self._holding.num_holders == 0

    def _held(self) -> Iterator[Fragment]:
        """What this rank has in memory: under ZeRO-0 everything, on every rank."""
        for parameter in self._parameters:
            place = self._holding.place(parameter)
            if place is not None:
                name, weight = self._names[id(parameter)], place.of(place.flat.data)
                yield Fragment(name, place.shape, place.start, weight, self._moments(place))

    @property
    def num_updates(self) -> int:
        """How many updates Adam has made: its own count, which its bias correction goes by."""
        counts = {int(state["step"]) for state in self._adam.state.values() if "step" in state}
        return max(counts, default=0)

    def load_moments(self, read: Callable[[str, str, int, int], Tensor], num_updates: int) -> None:
        """Fill Adam's moments: `read(kind, name, start, numel)` gives a slice of a saved, flattened moment."""
        for flat in self._holding.flats():
            self._adam.state[flat] = {
                "step": torch.tensor(float(num_updates)),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }
        for fragment in self._held():
            for kind, moment in fragment.moments.items():
                moment.copy_(read(kind, fragment.name, fragment.start, moment.numel()).view_as(moment))

    def close(self) -> None:
        """Let go of DeepSpeed's buffers and hooks."""
        self._engine.destroy()

    def _moments(self, place: Place) -> dict[str, Tensor]:
        state = self._adam.state.get(place.flat, {})
        return {kind: place.of(state[kind]) for kind in MOMENTS if kind in state}


def _settings(config: EngineConfig, micro_rows: int, num_micro_batches: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the file that `config.zero` names, and from the recipe what may stand only once."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"{config.zero}.json").read_text(encoding="utf-8"))
    settings["train_micro_batch_size_per_gpu"] = micro_rows
    settings["gradient_accumulation_steps"] = num_micro_batches
    settings["train_batch_size"] = micro_rows * num_micro_batches * world_size
    return settings

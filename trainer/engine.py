"""The only file that knows DeepSpeed: a ZeRO engine around a `TrainStep`, seen through a few plain methods.

    forward -> backward (per micro-batch) -> squared_norms -> step, at the learning rates it is told, or discard
    fragments: this rank's pieces of the trained weights and of their Adam moments, as flat fp32 tensors

ZeRO 0 holds everything on every rank, 1 and 2 hold a slice of the flattened parameter group, 3 a slice of every
parameter. A fragment says which slice of which parameter it is, so that a checkpoint does not depend on the ZeRO stage
or on the number of ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Place:
    """A slice of a parameter on this rank: [offset, offset + numel) of a flat buffer, `start` within the parameter."""

    flat: int
    offset: int
    start: int
    numel: int


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
        adamw = torch.optim.AdamW(
            [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups],
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
        )
        settings = _settings(config, micro_rows, num_micro_batches, ranks.world_size)
        self._zero_stage = int(settings["zero_optimization"]["stage"])
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=module, optimizer=adamw, config=settings)

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
        share = 1.0 / self._ranks.world_size if self._zero_stage == 0 else 1.0
        sums = [0.0] * self._num_groups
        for group, pieces in self._gradients():
            if pieces:
                # In fp32 the last bit of a norm depends on how the memory is aligned, and with it a resumed run's.
                norms = torch._foreach_norm([piece.detach() for piece in pieces], 2, dtype=torch.float64)
                sums[group] += share * float(torch.stack(list(norms)).square().sum())
        return sums

    def step(self, learning_rates: list[float], norm: float, scale: float = 1.0) -> None:
        """Update the weights at one learning rate a group, with the gradient clipped by its norm.

        `norm` is the gradient's without the `scale` that its backward was told.
        """
        for group, rate in zip(self._optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        divisor = scale * max(1.0, norm / self._clip_norm)
        if self._zero_stage > 0:
            # What DeepSpeed calls an external loss scale: it divides gradients by it, in every stage. It would multiply
            # the next loss by it, too, so it is taken back below.
            self._optimizer.custom_loss_scaler, self._optimizer.external_loss_scale = True, divisor
        elif divisor != 1.0:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(divisor)
        self._engine.step()
        if self._zero_stage > 0:
            self._optimizer.custom_loss_scaler, self._optimizer.external_loss_scale = False, None
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed refused a step whose gradient had been found finite on every rank")

    def discard(self) -> None:
        """Throw the gradient away instead of a step: weights and moments stay bit for bit what they were.

        DeepSpeed drops a gradient that is not finite, on every rank and with everything it had put aside; so it is
        made not finite.
        """
        if self._zero_stage == 0:
            self._engine.zero_grad()
            return
        for _, pieces in self._gradients():
            for piece in pieces:
                piece.fill_(math.nan)
        norms = getattr(self._optimizer, "norm_for_param_grads", {})  # offloading takes them when it copies
        for key in norms:
            norms[key] = torch.full_like(torch.as_tensor(norms[key]), math.inf)
        self._engine.step()
        if self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed took a step on a gradient that was to be discarded")

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's slices of the gradient after the last backward, flat, with the name of their parameter."""
        flats = {group: torch.cat([piece.reshape(-1) for piece in pieces]) for group, pieces in self._flat_gradients()}
        for parameter in self._parameters:
            name = self._names[id(parameter)]
            if self._zero_stage == 0:
                yield name, torch.zeros(0) if parameter.grad is None else parameter.grad.reshape(-1)
                continue
            place = self._place(parameter)
            if place is not None:
                yield name, flats[place.flat].narrow(0, place.offset, place.numel)

    def slices(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's slices of the trained weights, flat, with their names; over all ranks each element once."""
        for fragment in self.fragments():
            yield fragment.name, fragment.weight

    def own_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """`gradients`, but over all ranks each element once."""
        return self.gradients() if self._zero_stage > 0 or self._ranks.is_first else iter(())

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within it every parameter is whole on every rank and a forward makes no collective call: ranks may generate.

        Under ZeRO-3 that takes the memory of the whole model; its hooks, which would gather and release weights module
        by module, are taken off for the while.
        """
        if self._zero_stage < 3:
            yield
            return
        hooks = self._optimizer.parameter_offload
        hooks.destroy()
        try:
            with deepspeed.zero.GatheredParameters(list(self._engine.module.parameters())):
                yield
        finally:
            hooks.forward_hooks, hooks.backward_hooks = [], []
            hooks.setup_zero_stage3_hooks()

    def set_weights(self, read: Callable[[str], Tensor]) -> None:
        """Put `read(name)` in place of every trained weight, on every rank alike."""
        gathered = deepspeed.zero.GatheredParameters(self._parameters, modifier_rank=0, enabled=self._zero_stage == 3)
        with gathered:
            for parameter in self._parameters:
                parameter.data.copy_(read(self._names[id(parameter)]))
        if self._zero_stage > 0:
            self._optimizer.refresh_fp32_params()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's slices of everything that learns; over all ranks each element comes exactly once."""
        return self._held() if self._zero_stage > 0 or self._ranks.is_first else iter(())

    def _held(self) -> Iterator[Fragment]:
        """What this rank has in memory: under ZeRO-0 everything, on every rank."""
        for parameter in self._parameters:
            fragment = self._fragment(parameter, self._names[id(parameter)])
            if fragment is not None:
                yield fragment

    @property
    def num_updates(self) -> int:
        """How many updates Adam has made: its own count, which its bias correction goes by."""
        counts = {int(state["step"]) for state in self._adam().state.values() if "step" in state}
        return max(counts, default=0)

    def load_moments(self, read: Callable[[str, str, int, int], Tensor], num_updates: int) -> None:
        """Fill Adam's moments: `read(kind, name, start, numel)` gives a slice of a saved, flattened moment."""
        for flat in self._flat_parameters():
            self._adam().state[flat] = {
                "step": torch.tensor(float(num_updates)),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }
        for fragment in self._held():
            for kind, moment in fragment.moments.items():
                moment.copy_(read(kind, fragment.name, fragment.start, moment.numel()).view_as(moment))

    def close(self) -> None:
        """Let go of DeepSpeed's buffers and hooks."""
        self._engine.destroy()

    def _flat_parameters(self) -> list[Tensor]:
        """The tensors that Adam keeps moments for. Under ZeRO-3 its groups are empty between two steps."""
        if self._zero_stage == 0:
            return list(self._parameters)
        if self._zero_stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _adam(self) -> Any:
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def _moments(self, flat: Tensor, start: int, numel: int) -> dict[str, Tensor]:
        state = self._adam().state.get(flat, {})
        return {kind: state[kind].view(-1).narrow(0, start, numel) for kind in MOMENTS if kind in state}

    def _gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Each group's number, as the recipe's groups are numbered, and the pieces of its gradient on this rank."""
        if self._zero_stage == 0:
            for number, group in enumerate(self._optimizer.param_groups):
                yield number, [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        for flat, pieces in self._flat_gradients():
            yield (self._optimizer.sub_group_to_group_id[flat] if self._zero_stage == 3 else flat), pieces

    def _flat_gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The number of each flat buffer of ZeRO's and the pieces of its gradient, one after the other."""
        if self._zero_stage == 0:
            return
        for flat, weights in enumerate(self._flat_parameters()):
            pieces = self._optimizer.averaged_gradients.get(flat)
            if pieces is None:  # offloading puts the gradient where the optimizer looks for it
                assert weights.grad is not None
                pieces = [weights.grad]
            yield flat, list(pieces)

    def _place(self, parameter: Any) -> Place | None:
        """Where this rank's slice of a parameter lies under ZeRO 1 to 3; None where it holds none of it."""
        if self._zero_stage == 3:
            # ZeRO-3 pads every parameter to a multiple of the ranks; the padding belongs to nobody.
            flat, offset, numel = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            start = self._ranks.rank * numel
            numel = min(numel, parameter.ds_numel - start)
            return Place(flat, offset, start, numel) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        inner = mapping.hp_fragment_address
        return Place(mapping.param_group_index, inner.start, mapping.lp_fragment_address.start, inner.numel)

    def _fragment(self, parameter: Any, name: str) -> Fragment | None:
        if self._zero_stage == 0:
            weight = parameter.data.view(-1)
            return Fragment(name, tuple(parameter.shape), 0, weight, self._moments(parameter, 0, weight.numel()))
        place = self._place(parameter)
        if place is None:
            return None
        flat = self._flat_parameters()[place.flat]
        shape = tuple(parameter.ds_shape) if self._zero_stage == 3 else tuple(parameter.shape)
        weight = flat.data.narrow(0, place.offset, place.numel)
        return Fragment(name, shape, place.start, weight, self._moments(flat, place.offset, place.numel))


def _settings(config: EngineConfig, micro_rows: int, num_micro_batches: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the file that `config.zero` names, and from the recipe what may stand only once."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"{config.zero}.json").read_text(encoding="utf-8"))
    settings["train_micro_batch_size_per_gpu"] = micro_rows
    settings["gradient_accumulation_steps"] = num_micro_batches
    settings["train_batch_size"] = micro_rows * num_micro_batches * world_size
    return settings

"""The only file that knows DeepSpeed: a ZeRO engine around a `TrainStep`, seen through a few plain methods.

    forward -> backward (per micro-batch) -> step (once, at the learning rates it is told)
    fragments: this rank's pieces of the trained weights and of their Adam moments, as flat fp32 tensors

ZeRO 0 holds everything on every rank, 1 and 2 hold a slice of the flattened parameter group, 3 a slice of every
parameter. A fragment says which slice of which parameter it is, so that a checkpoint does not depend on the ZeRO stage
or on the number of ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
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


def start_distributed(ranks: Ranks) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo elsewhere); the device of this rank."""
    has_cuda = torch.cuda.is_available()
    # On a CPU DeepSpeed would compile a shared-memory op here, 40 s of a C++ compiler, and hang on its lock file if a
    # build was once killed. gloo does the same reductions.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if has_cuda:
        torch.cuda.set_device(ranks.local_rank)
    deepspeed.init_distributed(dist_backend="nccl" if has_cuda else "gloo", verbose=False)
    return torch.device("cuda", ranks.local_rank) if has_cuda else torch.device("cpu")


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
        self._clip_norm = optimizer.clip_norm
        self._names = {id(p): name for group in groups for name, p in zip(group.names, group.parameters, strict=True)}
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        # The rates are set before every step; 0 here makes a step that forgot to set them visible.
        adamw = torch.optim.AdamW(
            [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups],
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
        )
        settings = _settings(config, optimizer, micro_rows, num_micro_batches, ranks.world_size)
        self._zero_stage = int(settings["zero_optimization"]["stage"])
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=module, optimizer=adamw, config=settings)

    def forward(self, batch: Batch) -> LossSum:
        """The sums of one micro-batch."""
        sums: LossSum = self._engine(batch)
        return sums

    def backward(self, loss_sum: Tensor, num_targets: float) -> None:
        """Add the gradient of loss_sum / num_targets, where num_targets counts the whole global batch.

        DeepSpeed divides by the number of ranks when it reduces; multiplied back, a gradient is the sum over all.
        """
        self._engine.backward(loss_sum * (self._ranks.world_size / num_targets), scale_wrt_gas=False)

    def evaluate(self, batch: Batch) -> LossSum:
        """The sums of one micro-batch without a gradient and without dropout."""
        self._engine.eval()
        with torch.no_grad():
            sums: LossSum = self._engine(batch)
        self._engine.train()
        return sums

    def end_micro_batch(self) -> None:
        """Close a micro-batch that is not the step's last one."""
        self._engine.step()

    def step(self, learning_rates: list[float]) -> float:
        """Close the last micro-batch and update the weights, one learning rate a group; the gradient's norm."""
        for group, rate in zip(self._optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        if self._zero_stage > 0:
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
            return math.nan if norm is None else float(norm)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm or math.inf)
        self._engine.step()
        return float(norm)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's slices of everything that learns; over all ranks each element comes exactly once."""
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
        for fragment in self.fragments():
            for kind, moment in fragment.moments.items():
                moment.copy_(read(kind, fragment.name, fragment.start, moment.numel()).view_as(moment))

    def close(self) -> None:
        """Leave the process group; a run that ends without this waits for its peers' sockets."""
        self._engine.destroy()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

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

    def _fragment(self, parameter: Any, name: str) -> Fragment | None:
        if self._zero_stage == 0:
            if not self._ranks.is_first:
                return None
            flat = parameter.data.view(-1)
            return Fragment(name, tuple(parameter.shape), 0, flat, self._moments(parameter, 0, flat.numel()))
        if self._zero_stage == 3:
            return self._zero3_fragment(parameter, name)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        place = mapping.hp_fragment_address
        moments = self._moments(flat, place.start, place.numel)
        return Fragment(
            name, tuple(parameter.shape), mapping.lp_fragment_address.start, mapping.hp_fragment.data, moments
        )

    def _zero3_fragment(self, parameter: Any, name: str) -> Fragment | None:
        """ZeRO-3 pads every parameter to a multiple of the ranks; the padding belongs to nobody."""
        optimizer = self._optimizer
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = self._ranks.rank * numel
        numel = min(numel, parameter.ds_numel - start)
        if numel <= 0:
            return None
        flat = optimizer.fp32_partitioned_groups_flat[group]
        moments = self._moments(flat, offset, numel)
        return Fragment(name, tuple(parameter.ds_shape), start, flat.data.narrow(0, offset, numel), moments)


def _settings(
    config: EngineConfig, optimizer: AdamW, micro_rows: int, num_micro_batches: int, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration: the file that `config.zero` names, and from the recipe what may stand only once."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"{config.zero}.json").read_text(encoding="utf-8"))
    settings["train_micro_batch_size_per_gpu"] = micro_rows
    settings["gradient_accumulation_steps"] = num_micro_batches
    settings["train_batch_size"] = micro_rows * num_micro_batches * world_size
    if optimizer.clip_norm is not None and settings["zero_optimization"]["stage"] > 0:
        settings["gradient_clipping"] = optimizer.clip_norm
    return settings

"""Rank, world size and the few collectives that ranks use.

Four launchers set four groups of environment variables (`deepspeed`, `torchrun`, `srun`, none); `from_environment` maps
them to one. Sums and barriers go through torch.distributed once the engine has started it.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.common.errors import InputError


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank, the number of processes, and its place on its machine; the default is a single process.

    `sum`, `gather` and `barrier` are collectives: every rank must call them, in the same order.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what one process writes for all."""
        return self.rank == 0

    def local_rows(self, num_rows: int) -> range:
        """The rows of a global batch of `num_rows` that this rank computes.

        Contiguous, in rank order, and of lengths that differ by 1 at most; empty where there are more ranks than rows.
        """
        return range(self.rank * num_rows // self.world_size, (self.rank + 1) * num_rows // self.world_size)

    def check_rows(self, num_rows: int, where: str) -> None:
        """Raise InputError where a batch has fewer rows than there are ranks: some would have nothing to compute."""
        if num_rows < self.world_size:
            raise InputError(
                f"{where}: {num_rows}, fewer than the {self.world_size} ranks of this start; each computes one row at "
                f"least, so raise it to {self.world_size} or start fewer ranks"
            )

    def sum(self, values: Sequence[float]) -> list[float]:
        """The element-wise sum over all ranks, in float64 (exact for counts below 2^53)."""
        if self.world_size == 1:
            return [float(value) for value in values]
        import torch
        import torch.distributed

        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """The small picklable `value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            import torch.distributed

            torch.distributed.barrier()


def from_environment(environment: MutableMapping[str, str] = os.environ) -> DistributedContext:
    """This process's context, from the launcher's environment variables.

    Sets RANK, WORLD_SIZE and LOCAL_RANK under `srun`, and the master's address too without a launcher: libraries read
    them.

    Raises:
        InputError: the variables are incomplete or contradict each other.
    """
    try:
        if (
            "RANK" not in environment
            and int(environment.get("SLURM_NTASKS", "1")) > 1
            and "SLURM_PROCID" in environment
        ):
            _set_from_slurm(environment)
        if "RANK" not in environment:
            # Nobody has to find a rank that is alone (start_distributed): libraries want the variables all the same.
            environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        context = DistributedContext(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"RANK, WORLD_SIZE, LOCAL_RANK: incomplete in the environment ({error}); start through a launcher"
        ) from error
    if not 0 <= context.rank < context.world_size:
        raise InputError(
            f"RANK={context.rank}, WORLD_SIZE={context.world_size}: a rank is below the number of ranks; start through "
            "a launcher"
        )
    return context


def _set_from_slurm(environment: MutableMapping[str, str]) -> None:
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise InputError("MASTER_ADDR and MASTER_PORT: not set; under srun the batch script sets them (see slurm/)")

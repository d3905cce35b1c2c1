"""Who this process is among the processes of a run, and the few things that they tell each other.

Four launchers set four groups of environment variables (`deepspeed`, `torchrun`, `srun`, none); `from_environment` maps
them to one. Sums and barriers go through torch.distributed once the engine has started it.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of processes, and its place on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, num_slots: int) -> range:
        """The contiguous run of the global batch's rows that this rank computes."""
        return range(self.rank * num_slots // self.world_size, (self.rank + 1) * num_slots // self.world_size)

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


def from_environment(environment: MutableMapping[str, str] = os.environ) -> Ranks:
    """The ranks that the launcher set; under `srun` RANK, WORLD_SIZE and the master's address are set for libraries.

    Raises InputError where a launcher's variables are incomplete.
    """
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        _map_slurm(environment)
    if "RANK" not in environment:
        environment.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    try:
        return Ranks(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"RANK, WORLD_SIZE, LOCAL_RANK: incomplete in the environment ({error}); start through a launcher"
        ) from error


def _map_slurm(environment: MutableMapping[str, str]) -> None:
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise InputError("MASTER_ADDR and MASTER_PORT: not set; under srun the batch script sets them (see slurm/)")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Which of several workers a process is: under torchrun, srun, as a task of a Slurm array, or alone.

Workers share an evaluation by files alone and never wait for each other, so nothing hangs where one of them ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.common.errors import InputError


@dataclass(frozen=True)
class Worker:
    """Worker `rank` of `count`; `local_rank` is its number on its machine, so its GPU."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Worker:
        """What torchrun, a step of srun, or an array job says; alone without any of them.

        A step of one task inside of an array is that task of the array.

        Raises:
            InputError: what they say is no number, or no rank of that many.
        """
        for rank, count, local_rank in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ):
            if rank in environment and environment.get(count, "1") != "1":
                return cls._checked(environment, rank, count, local_rank)
        if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
            return cls._of_array(environment)
        return cls()

    @classmethod
    def _checked(cls, environment: Mapping[str, str], rank: str, count: str, local_rank: str) -> Worker:
        values = [_number(environment, name) for name in (rank, count)]
        local = _number(environment, local_rank) if local_rank in environment else 0
        if not 0 <= values[0] < values[1]:
            raise InputError(f"{rank}={values[0]} is no worker of {count}={values[1]}")
        return cls(values[0], values[1], local)

    @classmethod
    def _of_array(cls, environment: Mapping[str, str]) -> Worker:
        first = _number(environment, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environment else 0
        step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
        count = _number(environment, "SLURM_ARRAY_TASK_COUNT")
        rank, rest = divmod(_number(environment, "SLURM_ARRAY_TASK_ID") - first, max(1, step))
        if rest or not 0 <= rank < count:
            raise InputError("the array's tasks are numbered unevenly: take --array=0-N")
        return cls(rank, count)

    def device(self, name: str, num_devices: int) -> str:
        """The device called `name`; with "auto" and several GPUs this worker's own, in turn."""
        return f"cuda:{self.local_rank % num_devices}" if name == "auto" and num_devices > 1 else name


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise InputError(f"{name}={environment[name]!r} is no number") from None

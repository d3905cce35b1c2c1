"""Which worker a process is, from what its launcher says."""

from __future__ import annotations

import pytest

from eval.workers import Worker
from models.common.errors import InputError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        ({}, Worker()),
        (TORCHRUN, Worker(3, 4, 1)),
        (SRUN, Worker(5, 8, 1)),
        ({**SRUN, **TORCHRUN}, Worker(3, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Worker()),
        (ARRAY, Worker(2, 4)),
        ({**ARRAY, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Worker(2, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Worker()),
    ],
)
def test_torchrun_srun_an_array_or_alone(environment: dict[str, str], worker: Worker) -> None:
    assert Worker.of(environment) == worker


@pytest.mark.parametrize(
    "environment",
    [{**TORCHRUN, "RANK": "4"}, {**TORCHRUN, "RANK": "x"}, {**ARRAY, "SLURM_ARRAY_TASK_ID": "4"}],
)
def test_what_cannot_be_is_one_line(environment: dict[str, str]) -> None:
    with pytest.raises(InputError):
        Worker.of(environment)


def test_each_takes_a_gpu_of_its_machine() -> None:
    assert Worker(5, 8, 1).device("auto", 4) == "cuda:1"
    assert Worker(5, 8, 1).device("auto", 1) == "auto"
    assert Worker(5, 8, 1).device("auto", 0) == "auto"
    assert Worker(5, 8, 1).device("cpu", 4) == "cpu"
